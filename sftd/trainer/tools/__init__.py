"""Short-lived processes that need torch or transformers."""
