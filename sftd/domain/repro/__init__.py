"""Whether a step computed again matches the log."""
