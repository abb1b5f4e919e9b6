"""`sftd compare` and `sftd verify`: two runs, or a run and itself."""
