"""Frozen matrices in four bits (QLoRA): the format, and products whose weight is stored in it."""
