"""Mirrors of the log in other trackers."""
