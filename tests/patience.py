"""How long a test waits for something before it takes it for hung: less than pytest's own limit, which does not say for what.

Only what hangs takes so long. A start that takes a second here has taken half a minute on a busy machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 840.0


def until(condition: Callable[[], object], what: str = "not in time") -> None:
    """Wait until `condition()` holds: another program's state has no event to wait for."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
