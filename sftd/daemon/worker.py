"""Threads beside the tick loop, one for each mirror and each channel of notices. A tracker or channel that is down, slow or
broken never touches supervision, nor the others."""

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
# What is away for days is not worth a line every few seconds.
_REMIND_SECONDS = 3600.0


def _nothing() -> None:
    """Neither at the start nor at the end."""


class Worker:
    """Calls `sync` until stopped, and waits longer after each failure in a row: `first_backoff` seconds, then twice that, at
    most `last_backoff`.

    `begin` runs in the caller's thread before the first `sync`, `close` in the worker's after the last. `sync` returns 0 when
    nothing was new; it is called again when woken, and every `idle_seconds`, because commands and other daemons wake nobody
    here. A worker that `is_patient` retries to the last when the daemon ends; another one tries once more.
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
        # Nothing is left to do, or the last try has failed: `_has_all` says which.
        self._settled = threading.Event()
        self._has_all = False
        self._ending = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, unless it was started."""
        if self._thread.ident is None:
            self._begin()
            self._thread.start()

    def wake(self) -> None:
        """There may be something new."""
        self._settled.clear()
        self._wake.set()

    def end(self) -> None:
        """Do what is left now, however long ago the last failure was; `stop` waits for that."""
        self.wake()
        self._ending.set()

    def stop(self, patience: float) -> None:
        """End the thread. After `end`, wait at most `patience` seconds for what is left; the next daemon does the rest."""
        if self._thread.ident is None:
            return
        if self._ending.is_set() and not (self._settled.wait(patience) and self._has_all):
            self._log.warning("%s: not everything has arrived; the next daemon continues there", self.name)
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
                # The end of the daemon cuts one wait short, and not those after it.
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
    """The error without secrets: SQLAlchemy's message quotes the statement, and a library's may quote a URL."""
    if isinstance(error, SftdError | ImportError):
        return str(error)
    if (origin := getattr(error, "orig", None)) is not None:
        return str(origin).strip().partition("\n")[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"


def of_channel(notifier: Notifier, first_backoff: float = 1.0) -> Worker:
    """The worker that sends notices to one channel. What is recorded after its start is sent."""
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
