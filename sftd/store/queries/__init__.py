"""What the live screen, completion and name resolution ask."""
