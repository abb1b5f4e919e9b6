"""The files of an attempt."""
