"""Runs an evaluation of a checkpoint: `python -m sftd.trainer.tools.evaluate`."""
