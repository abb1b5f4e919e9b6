"""Read-only queries of commands and daemons."""
