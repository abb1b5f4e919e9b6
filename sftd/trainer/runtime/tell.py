"""What a trainer without a daemon says to the person who started it."""

from __future__ import annotations

import contextlib
import sys


def tell(text: str) -> None:
    """Print for the person who trains. That nobody reads it any more does not end the training."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()
