"""Queries of the live screen, shell completion and name resolution."""
