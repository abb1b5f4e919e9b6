"""Terminal output of a trainer without a daemon."""

from __future__ import annotations

import contextlib
import sys


def print_text(text: str) -> None:
    """Print `text`. A closed pipe does not end the training."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()
