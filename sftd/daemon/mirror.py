"""The thread that feeds MLflow. An MLflow that is down, slow or broken never touches supervision."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("sftd.mirror")

_FIRST_BACKOFF, _LAST_BACKOFF = 1.0, 15.0
_IDLE_SECONDS = 1.0
# An MLflow that is away for days is not worth a line every few seconds.
_REMIND_SECONDS = 3600.0


class Mirror(Protocol):
    """What copies the log to somewhere else."""

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy what is new. Returns the number of events taken in."""
        ...

    def close(self) -> None:
        """No more is copied."""
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
        said, remind_at = "", 0.0
        while not self._stop.is_set():
            self._wake.clear()
            try:
                mirror = mirror or self._make()
                taken = mirror.sync(self._stop.is_set)
            except Exception as error:  # noqa: BLE001  whatever MLflow throws must not end the daemon
                if str(error) != said or time.monotonic() >= remind_at:
                    log.warning("MLflow mirror: %s; trying again, nothing is lost", error)
                    said, remind_at = str(error), time.monotonic() + _REMIND_SECONDS
                self._stop.wait(backoff)
                backoff = min(_LAST_BACKOFF, 2 * backoff)
                continue
            backoff = _FIRST_BACKOFF
            if said:
                said = ""
                log.info("MLflow mirror: MLflow takes data again")
            if taken == 0 and not self._wake.is_set():
                self._caught_up.set()
                self._wake.wait(_IDLE_SECONDS)
        if mirror is not None:
            try:
                mirror.close()
            except Exception as error:  # noqa: BLE001  its lease expires by itself
                log.warning("MLflow mirror: %s", error)
