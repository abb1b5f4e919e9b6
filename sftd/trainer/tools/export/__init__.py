"""A checkpoint back to a Hugging Face folder: `python -m sftd.trainer.tools.export`, on one process of a CPU."""
