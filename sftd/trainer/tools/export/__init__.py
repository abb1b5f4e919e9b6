"""Converts a checkpoint to a Hugging Face folder in one CPU process: `python -m sftd.trainer.tools.export`."""
