"""The interface to a tracker: `Mirror` locates and opens it, `Writer` writes the events of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from sftd.domain.errors import SftdError
from sftd.domain.finding import Finding
from sftd.domain.log.events import Recorded
from sftd.settings import Settings
from sftd.store.database.engine import Store


class MirrorUnavailable(SftdError):
    """The tracker does not answer, or refuses. No data is lost: the same events are sent again later."""


class Interrupted(Exception):
    """`go_on` raises it between two requests of a writer when the daemon stops or another daemon has the turn."""


class Writer(Protocol):
    """An open tracker. Not thread-safe. Its methods raise `MirrorUnavailable`."""

    types: tuple[str, ...]
    """The event types that the tracker shows. Others are neither read nor decoded."""

    def cursor(self, run_id: str, version: int) -> int:
        """The version of the run's stream up to which the tracker has every event, read from the tracker. At least `version` if
        there is nothing to write up to `version`."""
        ...

    def send(self, run_id: str, page: Sequence[Recorded], upto: int, go_on: Callable[[], None]) -> None:
        """Write the events after the cursor, in order; then move the cursor to `upto`. `page` has all events of `types` up to
        `upto`. Must be idempotent: after a crash the same events are sent again. Calls `go_on` before each request."""
        ...

    def forget(self) -> None:
        """Drop remembered cursors, because a request failed or another daemon has written in the meantime."""
        ...


class Mirror(Protocol):
    """A kind of tracker."""

    name: str
    """The name in logs, in `sftd doctor` and in the label `mirror` of the metrics."""

    def position(self, settings: Settings) -> str | None:
        """The name of this mirror's position and lease in the database: the same for the same tracker, without secrets. None if
        the mirror is off."""
        ...

    def open(self, settings: Settings, store: Store) -> Writer:
        """Open the tracker. Imports its client library now or later. `store` gives the writer facts that a page does not have."""
        ...

    def check(self, settings: Settings) -> Iterator[Finding]:
        """The findings for `sftd doctor`."""
        ...
