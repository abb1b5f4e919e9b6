"""Send notices of events in the log to users."""
