"""`sftd db`."""
