"""What people ask for: each function is one command that writes."""
