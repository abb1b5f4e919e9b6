"""The data of a live board: queue, devices, training runs and recent events. Nothing here writes. A second look reads only what
has changed since the first."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from sftd.domain.compare.curves import Curves, RunCurves
from sftd.domain.log.events import Micros, Recorded, SourceFigures
from sftd.domain.queue.order import Limits
from sftd.domain.run.goodput import Ledger
from sftd.domain.run.state import ACTIVE, Run
from sftd.operations.context import Context
from sftd.operations.queries.nodes import Node, list_nodes
from sftd.operations.queries.queue import QueueRow, list_queue
from sftd.store.database.engine import DatabaseUnreachable, Store
from sftd.store.log import curves as curve_store
from sftd.store.log import event_store
from sftd.store.log.runs import load_run
from sftd.store.queries import board as board_store
from sftd.store.queries.resolve import resolve_id

# Number of steps for the loss curve, and for the speed.
_RECENT, _SPEED = 240, 10
# Events of all runs that the first look reads back, and events that the board of one run reads per look.
_BACK, _PAGE = 20_000, 20_000
_NOTICES, _NOTICES_OF_RUN = 60, 12
_NODES_MICROS = 5_000_000


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a daemon drives. `losses` are those of the last steps. Speed and MFU are means over the last few steps, None
    if no step has them; so is the accuracy. `stepped_at` is the end of the last step."""

    run: Run
    losses: list[float]
    tokens_per_second: float | None
    mfu: float | None
    token_accuracy: float | None
    memory: int | None
    seconds_left: float | None
    stepped_at: Micros | None
    last: Recorded | None
    host: str | None = None
    observed: bool = True


class Board(msgspec.Struct, frozen=True):
    """One look. `notices` and `failures` are events other than steps, newest first."""

    at: Micros
    queue: list[QueueRow]
    nodes: list[Node]
    runs: list[RunLine]
    notices: list[Recorded]
    failures: list[Recorded]


class RunBoard(msgspec.Struct, frozen=True):
    """One look at one run. `history` holds the curves that are read so far; `ledger` is None until `is_complete`. `sources`: those
    of the last step."""

    at: Micros
    line: RunLine
    row: QueueRow | None
    history: RunCurves
    is_complete: bool
    ledger: Ledger | None
    notices: list[Recorded]
    sources: dict[str, SourceFigures] | None


class _Steps:
    """The last steps of one run."""

    def __init__(self) -> None:
        self.version = 0
        self._curves = Curves()
        self._at: Micros | None = None

    def catch_up(self, connection: sa.Connection, run_id: str) -> None:
        """Read the steps since the last call."""
        for version, at, point in board_store.last_points(connection, run_id, self.version, _RECENT):
            self._curves.add(point)
            self.version, self._at = version, at
        if self._curves.timeline.count > 8 * _RECENT:
            self._curves = self._curves.tail(_RECENT)

    def _values(self, name: str, count: int = _SPEED) -> Sequence[float]:
        return self._curves.values(name, self._curves.last - count + 1, self._curves.last)

    def tokens_per_second(self) -> float | None:
        """Speed over the last few steps."""
        seconds = math.fsum(self._values("seconds"))
        return sum(self._values("tokens_real")) / seconds if seconds > 0 else None

    def line(self, run: Run, row: QueueRow | None, last: Recorded | None) -> RunLine:
        """The board's line of the run."""
        left = None
        if run.status in ACTIVE and run.seconds_per_step is not None:
            left = max(0, run.planned_steps - run.step) * run.seconds_per_step
        return RunLine(
            run=run,
            losses=list(self._values("loss", _RECENT)),
            tokens_per_second=self.tokens_per_second(),
            mfu=self._curves.mean_over_time("mfu", self._curves.last - _SPEED + 1, self._curves.last),
            token_accuracy=self._curves.mean(
                "token_accuracy", self._curves.last - _SPEED + 1, self._curves.last
            ),
            memory=int(max(self._values("memory"), default=0)) or None,
            seconds_left=left,
            stepped_at=self._at,
            last=last,
            host=row.host if row else None,
            observed=row.observed if row else True,
        )


def tokens_per_second(store: Store, run_id: str) -> float | None:
    """The speed of a run's last few steps, as the board shows it; None without a step."""
    steps = _Steps()
    with store.read() as connection:
        steps.catch_up(connection, run_id)
    return steps.tokens_per_second()


class _Watched:
    """A database that may disappear, or be replaced by another one."""

    def __init__(self, store: Store, context: Context, limits: Limits, silent_micros: int) -> None:
        self.store, self.context, self.limits, self.silent = store, context, limits, silent_micros
        url = store.engine.url
        self._file = url.database if url.get_backend_name() == "sqlite" else None
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        try:
            found = os.stat(self._file)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def forget(self) -> None:
        """Start over with another database, or with an earlier state of this one."""

    def check(self) -> None:
        """Check that the SQLite file is the one that was opened: a deleted file stays readable while it is open. Raises
        `DatabaseUnreachable`."""
        if self._file is None:
            return
        identity = self._identify()
        if identity is not None and identity == self._identity:
            return
        # The open connections belong to the old file.
        self.store.engine.dispose()
        if identity is None:
            raise DatabaseUnreachable(f"{self._file} is gone")
        self._identity = identity
        self.forget()


class Observer(_Watched):
    """Reads the board of all runs."""

    def __init__(self, store: Store, context: Context, limits: Limits, silent_micros: int) -> None:
        super().__init__(store, context, limits, silent_micros)
        self.forget()

    def forget(self) -> None:
        """Start over."""
        self._position = -1
        self._steps: dict[str, _Steps] = {}
        self._last: dict[str, Recorded] = {}
        self._notices: deque[Recorded] = deque(maxlen=_NOTICES)
        self._failures: deque[Recorded] = deque(maxlen=_NOTICES)
        self._nodes: list[Node] = []
        self._nodes_of: tuple[Micros, frozenset[str]] | None = None

    def look(self) -> Board:
        """Look once. Raises the database driver's errors."""
        self.check()
        rows = list_queue(self.store, self.context, self.limits, self.silent)
        driven = [row for row in rows if not row.kind]
        nodes = self._look_at_nodes(frozenset(row.run_id for row in driven))
        with self.store.read() as connection:
            self._take_notices(connection)
            runs = board_store.states(connection, [row.run_id for row in driven])
            self._steps = {name: steps for name, steps in self._steps.items() if name in runs}
            lines = [self._line(connection, runs[row.run_id], row) for row in driven if row.run_id in runs]
        return Board(
            self.context.now(), rows, nodes, lines, list(self._notices)[::-1], list(self._failures)[::-1]
        )

    def _look_at_nodes(self, driven: frozenset[str]) -> list[Node]:
        """The daemons. Finding the devices in use reads all launches of the driven runs, so the result is reused for a few
        seconds while the same runs are driven."""
        now = self.context.now()
        if self._nodes_of is None or self._nodes_of[1] != driven or now - self._nodes_of[0] > _NODES_MICROS:
            self._nodes, self._nodes_of = list_nodes(self.store, self.context, self.silent), (now, driven)
        return self._nodes

    def _take_notices(self, connection: sa.Connection) -> None:
        position = event_store.last_position(connection)
        if position < self._position:
            self.forget()
        after = max(self._position, position - _BACK)
        for recorded in reversed(board_store.notices_between(connection, after, position, 4 * _NOTICES)):
            if recorded.event.severity != "detail":
                self._last[recorded.run_id] = recorded
                failed = recorded.event.severity == "problem"
                (self._failures if failed else self._notices).append(recorded)
        self._position = position

    def _line(self, connection: sa.Connection, run: Run, row: QueueRow) -> RunLine:
        steps = self._steps.setdefault(run.run_id, _Steps())
        steps.catch_up(connection, run.run_id)
        if run.run_id not in self._last:
            found = board_store.last_notices(connection, run.run_id, _NOTICES_OF_RUN)
            # A run's first event is never a detail, so there is one.
            self._last |= {r.run_id: r for r in reversed(found) if r.event.severity != "detail"}
        return steps.line(run, row, self._last.get(run.run_id))


class RunObserver(_Watched):
    """Reads the board of one run."""

    def __init__(
        self, store: Store, context: Context, limits: Limits, silent_micros: int, prefix: str
    ) -> None:
        """`prefix` begins the id of one run. Raises `RunNotFound` or `AmbiguousRun`."""
        super().__init__(store, context, limits, silent_micros)
        with store.read() as connection:
            self.run_id = resolve_id(connection, prefix)
        self.forget()

    def forget(self) -> None:
        """Start over."""
        self._steps, self._history = _Steps(), RunCurves()

    def look(self) -> RunBoard:
        """Look once. Raises the database driver's errors."""
        self.check()
        rows = list_queue(self.store, self.context, self.limits, self.silent)
        row = next((row for row in rows if row.run_id == self.run_id), None)
        now = self.context.now()
        with self.store.read() as connection:
            run = load_run(connection, self.run_id)
            if run.version < self._history.version:
                self.forget()
            self._steps.catch_up(connection, self.run_id)
            read = curve_store.advance(connection, self.run_id, self._history, limit=_PAGE)
            notices = board_store.last_notices(connection, self.run_id, 4 * _NOTICES_OF_RUN)
            step = event_store.last_step(connection, self.run_id) if run.step else None
        kept = [r for r in notices if r.event.severity != "detail"][:_NOTICES_OF_RUN]
        line = self._steps.line(run, row, kept[0] if kept else None)
        is_complete = read < _PAGE
        ledger = self._history.fold.ledger(now) if is_complete else None
        sources = step.sources if step else None
        return RunBoard(now, line, row, self._history, is_complete, ledger, kept, sources)
