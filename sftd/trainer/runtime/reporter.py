"""Event reporting: all ranks call it, one rank writes the journal."""

from __future__ import annotations

from sftd.domain.log.events import Event
from sftd.trainer.errors import GivenUp
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import JournalWriter


class Reporter:
    """Appends events on the reporting rank. Does nothing on the others, so callers need no `if`."""

    def __init__(self, attempt: AttemptDir, is_reporter: bool) -> None:
        self._attempt = attempt
        self.check_fence()
        self._journal = JournalWriter(attempt.journal) if is_reporter else None

    def check_fence(self) -> None:
        """Raise `GivenUp` once the run no longer belongs to this attempt: a machine that the resource manager gave up may
        still run. Call this on any rank before it writes a file that others read."""
        if self._attempt.is_fenced():
            raise GivenUp(f"{self._attempt.path} was given up: another attempt may train this run")

    def emit(self, event: Event) -> None:
        """Append an event with one write. After the return, the event survives a crash of this process."""
        if self._journal:
            self.check_fence()
            self._journal.append(event)

    def flush(self) -> None:
        """Sync the journal. After the return, all events so far survive a power cut."""
        if self._journal:
            self._journal.flush()

    def close(self) -> None:
        """Flush and close the journal."""
        if self._journal:
            self._journal.close()
