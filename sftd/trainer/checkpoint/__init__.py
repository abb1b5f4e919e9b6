"""Checkpoints: writing, reading, loading."""
