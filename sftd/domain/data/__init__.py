"""What the domain knows of training data."""
