"""The optimizer and its state."""
