"""Who starts next, on what, and when."""
