"""The queue, leases and daemons."""
