"""Readers for the supported kinds of chat files."""
