"""The thread that feeds MLflow. An MLflow that is down, slow or broken never touches supervision."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("sftd.mirror")

_FIRST_BACKOFF, _LAST_BACKOFF = 1.0, 60.0
_IDLE_SECONDS = 1.0


class Mirror(Protocol):
    """What copies the log to somewhere else."""

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy what is new. Returns the number of events taken in."""
        ...


class MirrorThread:
    """Calls `sync` until stopped, waiting longer after each failure in a row."""

    def __init__(self, make: Callable[[], Mirror]) -> None:
        self._make = make
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._caught_up = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._caught_up.clear()
        self._wake.set()

    def stop(self, timeout: float, *, catch_up: bool) -> bool:
        """End the thread; with `catch_up`, first let it copy what is left. Returns whether all was copied in time."""
        if catch_up:
            self.wake()
            self._caught_up.wait(timeout)
        done = self._caught_up.is_set()
        self._stop.set()
        self._wake.set()
        self._thread.join(5.0)
        return done

    def _loop(self) -> None:
        mirror: Mirror | None = None
        backoff = _FIRST_BACKOFF
        while not self._stop.is_set():
            self._wake.clear()
            try:
                mirror = mirror or self._make()
                taken = mirror.sync(self._stop.is_set)
            except Exception as error:  # noqa: BLE001  whatever MLflow throws must not end the daemon
                log.warning("MLflow mirror: %s; trying again in %.0f s", error, backoff)
                self._stop.wait(backoff)
                backoff = min(_LAST_BACKOFF, 2 * backoff)
                continue
            backoff = _FIRST_BACKOFF
            if taken == 0 and not self._wake.is_set():
                self._caught_up.set()
                self._wake.wait(_IDLE_SECONDS)
