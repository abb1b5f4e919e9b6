"""What can be read of runs. Nothing here writes."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.events import Micros, Recorded
from sftd.domain.goodput import Ledger
from sftd.domain.run import Run
from sftd.store import event_store
from sftd.store.engine import Store
from sftd.store.goodput import read_ledger
from sftd.store.resolve import resolve_id
from sftd.store.runs import load_run
from sftd.store.tables import view_runs


class RunRow(msgspec.Struct, frozen=True):
    """A line of `sftd ls`. Times are µs since the epoch."""

    run_id: str
    status: str
    project: str
    name: str
    user: str
    submitted_at: int
    started_at: int | None
    ended_at: int | None
    attempt: int
    step: int
    planned_steps: int
    loss: str | None
    val_loss: str | None
    seconds_per_step: float | None
    anomalies: int
    message: str | None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left while it runs; None when that cannot be said."""
        if self.status != "running" or self.seconds_per_step is None:
            return None
        return (self.planned_steps - self.step) * self.seconds_per_step


def list_runs(
    store: Store, *, statuses: tuple[str, ...] = (), project: str | None = None, limit: int | None = None
) -> list[RunRow]:
    """Runs, newest first."""
    columns = [view_runs.c[name] for name in RunRow.__struct_fields__]
    query = sa.select(*columns).order_by(view_runs.c.submitted_at.desc(), view_runs.c.run_id).limit(limit)
    if statuses:
        query = query.where(view_runs.c.status.in_(statuses))
    if project is not None:
        query = query.where(view_runs.c.project == project)
    with store.read() as connection:
        # The driver's own rows: SQLAlchemy would make objects of ten thousand, for nothing that is needed here.
        return [RunRow(*row) for row in connection.execute(query).cursor.fetchall()]


def find_run(store: Store, prefix: str) -> Run:
    """The one run whose id begins with `prefix`. Raises `RunNotFound` or `AmbiguousRun`."""
    with store.read() as connection:
        return load_run(connection, resolve_id(connection, prefix))


def goodput(store: Store, run_id: str, now: Micros) -> Ledger:
    """Where a run's time went: to its end, or to `now` (µs)."""
    with store.read() as connection:
        return read_ledger(connection, run_id, now)


def run_events(
    store: Store, run_id: str, after_version: int = 0, types: tuple[str, ...] = (), limit: int | None = None
) -> list[Recorded]:
    """A run's events in order."""
    with store.read() as connection:
        return list(event_store.read_stream(connection, run_id, after_version, types, limit))


def raw_events(
    store: Store, run_id: str, after_version: int = 0, types: tuple[str, ...] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """A run's rows of the events table as they stand there."""
    with store.read() as connection:
        return list(event_store.raw_rows(connection, run_id, after_version, types, limit))
