"""`sftd compare` and `sftd verify`."""
