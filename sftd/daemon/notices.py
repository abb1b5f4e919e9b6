"""The threads that tell people what happened, one a channel. A channel that is down or slow holds up nobody else."""

from __future__ import annotations

import logging
import threading

from sftd.projections.notices.channels import NotSent
from sftd.projections.notices.notifier import Notifier

log = logging.getLogger("sftd.notify")

_FIRST_BACKOFF, _LAST_BACKOFF = 1.0, 300.0
# Other daemons of the same database wake nobody here.
_IDLE_SECONDS = 5.0
_LAST_WORDS_SECONDS = 5.0


class NoticeThread:
    """Sends what is new until stopped, waiting longer after each failure in a row."""

    def __init__(self, notifier: Notifier, first_backoff: float = _FIRST_BACKOFF) -> None:
        self._notifier = notifier
        self._first_backoff = first_backoff
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="notices", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it runs. What is recorded from now on is told."""
        if not self._thread.is_alive():
            self._notifier.begin()
            self._thread.start()

    def wake(self) -> None:
        """There may be something new."""
        self._idle.clear()
        self._wake.set()

    def stop(self) -> None:
        """End the thread, after a few seconds for what is left, which is tried once, however long ago it failed; the
        next daemon sends the rest."""
        if not self._thread.is_alive():
            return
        self.wake()
        self._ending.set()
        self._idle.wait(_LAST_WORDS_SECONDS)
        self._stop.set()
        self._wake.set()
        self._thread.join(_LAST_WORDS_SECONDS)

    def _loop(self) -> None:
        backoff = self._first_backoff
        while not self._stop.is_set():
            self._wake.clear()
            is_last = self._ending.is_set()
            try:
                self._notifier.sync(self._stop.is_set)
            except Exception as error:  # noqa: BLE001  whatever goes wrong must not end the daemon
                # A database's error quotes the statement; NotSent holds no secret.
                told = error if isinstance(error, NotSent) else type(error).__name__
                log.warning("%s: %s; trying again in %.0f s", self._notifier.channel.shown, told, backoff)
                if is_last:
                    self._idle.set()
                    self._stop.wait()
                else:
                    self._ending.wait(backoff)
                backoff = min(_LAST_BACKOFF, 2 * backoff)
                continue
            backoff = self._first_backoff
            if not self._wake.is_set():
                self._idle.set()
                self._wake.wait(_IDLE_SECONDS)
