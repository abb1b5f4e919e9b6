"""Training without a daemon."""
