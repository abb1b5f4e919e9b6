"""What people and daemons read. Nothing here writes."""
