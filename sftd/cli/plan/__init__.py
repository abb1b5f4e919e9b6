"""`sftd plan`."""
