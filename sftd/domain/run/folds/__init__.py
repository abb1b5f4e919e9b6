"""Folds of groups of events, which `fold` puts together."""
