"""The one rank that writes the journal, seen from all ranks."""

from __future__ import annotations

from sftd.domain.log.events import Event
from sftd.trainer.errors import GivenUp
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import JournalWriter


class Reporter:
    """Appends events on the reporting rank, does nothing on the others: callers need no `if`."""

    def __init__(self, attempt: AttemptDir, is_reporter: bool) -> None:
        self._attempt = attempt
        self.check_fence()
        self._journal = JournalWriter(attempt.journal) if is_reporter else None

    def check_fence(self) -> None:
        """Raises `GivenUp` once this attempt is no longer the run's: a machine that the resource manager gave up may still run. For
        any rank, before it writes what others read."""
        if self._attempt.is_fenced():
            raise GivenUp(f"{self._attempt.path} was given up: another attempt may train this run")

    def emit(self, event: Event) -> None:
        """Append an event: one buffered write. When it returns, the event survives this process."""
        if self._journal:
            self.check_fence()
            self._journal.append(event)

    def flush(self) -> None:
        """When it returns, every event so far survives a power cut."""
        if self._journal:
            self._journal.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._journal:
            self._journal.close()
