"""Output of a trainer without a daemon for the person who started it."""

from __future__ import annotations

import contextlib
import sys


def print_text(text: str) -> None:
    """Print; a closed pipe does not end the training."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()
