"""Distinguishes a hung attempt from a slow one by the time without a new line in its journal."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from sftd.domain.spec.sections import Launch

# If the daemon itself was suspended, the missed time must not count as the attempt's silence.
_LONGEST_GAP_SECONDS = 10.0
# Minimum limit before the first step: imports, rendezvous and loading are slow.
_START_SECONDS = 900.0
_STEPS = 100


class Watchdog:
    """Watches one attempt. Only observed time counts."""

    def __init__(self, launch: Launch, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._launch = launch
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._silent = 0.0
        self._looked = clock()

    @property
    def median_step(self) -> float | None:
        """Median duration of the last steps in seconds; None before the first."""
        return statistics.median(self._steps) if self._steps else None

    @property
    def limit(self) -> float | None:
        """Seconds of silence that count as a hang (see `launch.hang_seconds`). None if the watchdog is off."""
        if not self._launch.hang_seconds:
            return None
        if self.median_step is None:
            return max(float(self._launch.hang_seconds), _START_SECONDS)
        return max(float(self._launch.hang_seconds), self._launch.hang_factor * self.median_step)

    def progressed(self, step_seconds: list[float]) -> None:
        """Note new lines in the journal. `step_seconds` are the durations of the steps among them."""
        self._steps.extend(step_seconds)
        self._silent = 0.0
        self._looked = self._clock()

    def silent_too_long(self) -> float | None:
        """Seconds of silence if they exceed the limit, else None. Call it at every tick."""
        now = self._clock()
        self._silent += min(now - self._looked, _LONGEST_GAP_SECONDS)
        self._looked = now
        return self._silent if self.limit is not None and self._silent > self.limit else None
