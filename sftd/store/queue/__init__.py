"""The queue, leases, claims and daemons."""
