"""`sftd demo`."""
