"""Notices from the log to people."""
