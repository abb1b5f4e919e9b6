"""Data and model preparation: `python -m sftd.trainer.tools.prepare COMMAND ...` (see `__main__`).

Runs in a process of its own, because it imports transformers and torch; the CLI reads its
standard output, which carries JSON lines and nothing else.
"""
