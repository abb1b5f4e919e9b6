"""`sftd watch`."""
