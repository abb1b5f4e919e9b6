"""Predicted memory, time and disk use of a run."""
