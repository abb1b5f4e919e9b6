"""Threads beside the tick loop, one for each mirror and each notice channel. A tracker or channel that is down, slow or broken
does not affect supervision or other workers."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from sftd.domain.errors import SftdError
from sftd.projections.notices.notifier import Notifier

_JOIN_SECONDS = 5.0
# Limits the log lines of a long outage.
_REMIND_SECONDS = 3600.0


def _nothing() -> None:
    pass


class Worker:
    """Calls `sync` until stopped. After consecutive failures it waits `first_backoff` seconds, then doubles the wait up to
    `last_backoff`.

    `begin` runs in the caller's thread before the first `sync`, `close` in the worker's thread after the last. `sync` returns 0
    if nothing is new. It is called again after `wake`, and every `idle_seconds`, because commands and other daemons cannot
    wake this worker. When the daemon ends, a worker that `is_patient` retries until `stop`; others try once more.
    """

    def __init__(
        self,
        name: str,
        sync: Callable[[Callable[[], bool]], int],
        logger: logging.Logger,
        *,
        begin: Callable[[], object] = _nothing,
        close: Callable[[], object] = _nothing,
        first_backoff: float = 1.0,
        last_backoff: float,
        idle_seconds: float,
        is_patient: bool,
    ) -> None:
        self.name = name
        self._sync = sync
        self._log = logger
        self._begin = begin
        self._close = close
        self._first_backoff = first_backoff
        self._last_backoff = last_backoff
        self._idle_seconds = idle_seconds
        self._is_patient = is_patient
        self._wake = threading.Event()
        # Set when nothing is left to do (`_has_all`), or when the last try has failed.
        self._settled = threading.Event()
        self._has_all = False
        self._ending = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread if it has not been started."""
        if self._thread.ident is None:
            self._begin()
            self._thread.start()

    def wake(self) -> None:
        """Make the worker call `sync` soon."""
        self._settled.clear()
        self._wake.set()

    def end(self) -> None:
        """Send the rest now, without waiting for the back-off. `stop` waits for it."""
        self.wake()
        self._ending.set()

    def stop(self, patience: float) -> None:
        """End the thread. After `end`, wait at most `patience` seconds for the rest; the next daemon sends what remains."""
        if self._thread.ident is None:
            return
        if self._ending.is_set() and not (self._settled.wait(patience) and self._has_all):
            self._log.warning("%s: not everything was sent; the next daemon sends the rest", self.name)
        self._stop.set()
        self._ending.set()
        self._wake.set()
        self._thread.join(_JOIN_SECONDS)

    def _loop(self) -> None:
        backoff = self._first_backoff
        reported, remind_at = "", 0.0
        while not self._stop.is_set():
            self._wake.clear()
            is_last = self._ending.is_set()
            try:
                taken = self._sync(self._stop.is_set)
            except Exception as error:  # noqa: BLE001  whatever a tracker's client raises must not end the daemon
                text = _shown(error)
                if text != reported or time.monotonic() >= remind_at:
                    self._log.warning("%s: %s; trying again, nothing is lost", self.name, text)
                    reported, remind_at = text, time.monotonic() + _REMIND_SECONDS
                self._has_all = False
                if is_last and not self._is_patient:
                    self._settled.set()
                    break
                # `end` cuts the current wait short, but not later ones.
                (self._stop if is_last else self._ending).wait(backoff)
                backoff = min(2 * backoff, self._last_backoff)
                continue
            backoff = self._first_backoff
            if reported:
                reported = ""
                self._log.info("%s: works again", self.name)
            if taken == 0 and not self._wake.is_set():
                self._has_all = True
                self._settled.set()
                self._wake.wait(self._idle_seconds)
        try:
            self._close()
        except Exception as error:  # noqa: BLE001  its lease expires by itself
            self._log.warning("%s: %s", self.name, _shown(error))


def _shown(error: Exception) -> str:
    """The error without secrets: SQLAlchemy's message quotes the statement, and a library's message may quote a URL."""
    if isinstance(error, SftdError | ImportError):
        return str(error)
    if (origin := getattr(error, "orig", None)) is not None:
        return str(origin).strip().partition("\n")[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"


def of_channel(notifier: Notifier, first_backoff: float = 1.0) -> Worker:
    """The worker that sends notices to one channel, for events recorded after its start."""
    return Worker(
        notifier.channel.shown,
        notifier.sync,
        logging.getLogger("sftd.notify"),
        begin=notifier.begin,
        first_backoff=first_backoff,
        last_backoff=300.0,
        idle_seconds=5.0,
        is_patient=False,
    )
