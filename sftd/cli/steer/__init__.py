"""Commands that act on runs. None imports another."""
