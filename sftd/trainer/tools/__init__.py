"""Processes that need torch or transformers and end with an answer."""
