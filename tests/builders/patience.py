"""How long a test waits for something before it takes it for hung: less than pytest's own limit, which does not say for what.

Only what hangs takes so long. A start that takes a second here has taken half a minute on a busy machine. What has an event
to wait for is waited for by that; the rest is looked at again and again, and here alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 840.0
# Before the names of files, in the folder of the session, with the stacks of what hung and was started again.
HUNG = "hung-"


def until(condition: Callable[[], object], what: str = "not in time", *, every: float = 0.02) -> None:
    """Wait until `condition()` holds: another program's state has no event to wait for."""
    assert holds_within(PATIENCE, condition, every=every), what


def holds_within(seconds: float, condition: Callable[[], object], *, every: float = 0.02) -> bool:
    """Wait until `condition()` holds, or so long. Returns whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(every, left))
    return True


def never() -> bool:
    """Whether to stop: for what asks before each piece of work."""
    return False
