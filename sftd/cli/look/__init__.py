"""Commands that only read. None imports another."""
