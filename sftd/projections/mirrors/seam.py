"""What sftd needs of a tracker: `Mirror` says where it is and opens it, `Writer` takes a run's events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from sftd.domain.errors import SftdError
from sftd.domain.finding import Finding
from sftd.domain.log.events import Recorded
from sftd.settings import Settings
from sftd.store.database.engine import Store


class MirrorUnavailable(SftdError):
    """The tracker does not answer, or refuses. Nothing is lost: the same events are sent again later."""


class Interrupted(Exception):
    """`go_on` raises it between two requests of a writer: the daemon stops, or another one has the turn."""


class Writer(Protocol):
    """An open tracker. Used by one thread. Raises `MirrorUnavailable`."""

    types: tuple[str, ...]
    """The event types that the tracker shows. Others are neither read nor decoded."""

    def cursor(self, run_id: str, version: int) -> int:
        """The version of the run's stream up to which the tracker has everything, as the tracker says; at least `version`
        if nothing up to there is to be written."""
        ...

    def send(self, run_id: str, page: Sequence[Recorded], upto: int, go_on: Callable[[], None]) -> None:
        """Write the events after the cursor, in order; then move the cursor to `upto`. There are no more of `types` up to
        there. After a crash the same events come again, and may change nothing. Calls `go_on` before each request."""
        ...

    def forget(self) -> None:
        """Forget what is remembered of cursors: a request failed, or another daemon has written meanwhile."""
        ...


class Mirror(Protocol):
    """A kind of tracker."""

    name: str
    """As logs, `sftd doctor` and the label `mirror` of the metrics show it."""

    def position(self, settings: Settings) -> str | None:
        """The name under which the database keeps the position of this mirror and the lease on it: the same for the same
        place, without secrets. None where the mirror is off."""
        ...

    def open(self, settings: Settings, store: Store) -> Writer:
        """Open the tracker. Its client library is imported here or later. `store` is for what a page does not say."""
        ...

    def check(self, settings: Settings) -> Iterator[Finding]:
        """What `sftd doctor` says of it."""
        ...
