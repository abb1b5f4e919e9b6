"""Training data: facts, rows and chat templates."""
