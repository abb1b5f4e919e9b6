"""Data and model preparation: `python -m sftd.trainer.tools.prepare COMMAND ...` (see `__main__`).

Runs in a separate process, because it imports transformers and torch. The CLI reads its standard output, which has only
JSON lines.
"""
