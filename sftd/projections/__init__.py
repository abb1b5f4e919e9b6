"""Projections of the log: SQL views, mirrors in trackers, notices."""
