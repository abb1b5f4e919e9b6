"""Queries of runs and their events. Nothing here writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros, Recorded, StepCompleted, ValidationCompleted
from sftd.domain.run.goodput import Ledger
from sftd.domain.run.state import Run
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_files, view_runs, view_variants
from sftd.store.log import event_store
from sftd.store.log.goodput import read_ledger
from sftd.store.log.runs import load_run
from sftd.store.queries.resolve import members, resolve_id


class RunRow(msgspec.Struct, frozen=True):
    """A line of `sftd ls`. Times are µs since the epoch. `changed` is a JSON object with the settings of a sweep's point or of
    a fork; None for other runs. `bytes` is the size of its own checkpoints by the log."""

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
    sweep: str | None
    changed: str | None
    bytes: int

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left while it runs; None if unknown."""
        if self.status != "running" or self.seconds_per_step is None:
            return None
        return (self.planned_steps - self.step) * self.seconds_per_step

    @property
    def seconds(self) -> float | None:
        """Seconds from its first start to its end; None before both are known."""
        return (self.ended_at - self.started_at) / 1e6 if self.ended_at and self.started_at else None

    @property
    def changes(self) -> dict[str, Any]:
        """`changed`, decoded."""
        return msgspec.json.decode(self.changed, type=dict[str, Any]) if self.changed else {}


class Filter(msgspec.Struct, frozen=True):
    """The conditions of a list of runs: one of `patterns`, and all other fields that are given. `since` is the earliest
    submission, in µs since the epoch. `removed` selects the runs whose files were removed; without it they are left out."""

    patterns: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    project: str | None = None
    name: str | None = None
    sweep: str | None = None
    since: Micros | None = None
    removed: bool = False

    def conditions(self) -> Iterator[sa.ColumnElement[bool]]:
        """The SQL conditions."""
        c, removed_at = view_runs.c, view_files.c.removed_at
        yield removed_at.is_not(None) if self.removed else removed_at.is_(None)
        if self.patterns:
            yield sa.or_(*map(_matches, self.patterns))
        if self.statuses:
            yield c.status.in_(self.statuses)
        if self.project is not None:
            yield c.project == self.project
        if self.name is not None:
            yield _is_named(self.name)
        if self.sweep is not None:
            yield c.run_id.in_(members(self.sweep))
        if self.since is not None:
            yield c.submitted_at >= self.since


def _like(column: sa.ColumnElement[str], pattern: str) -> sa.ColumnElement[bool]:
    """Whether a text matches a pattern of `*` and `?`, case-insensitively."""
    escaped = re.sub(r"([%_\\])", r"\\\1", pattern).replace("*", "%").replace("?", "_")
    # The database lowers both: SQLite, and PostgreSQL in some locales, lower ASCII only.
    return sa.func.lower(column).like(sa.func.lower(escaped), escape="\\")


def _is_pattern(text: str) -> bool:
    return "*" in text or "?" in text


def _is_named(text: str) -> sa.ColumnElement[bool]:
    full = view_runs.c.project + "/" + view_runs.c.name
    if _is_pattern(text):
        return _like(view_runs.c.name, text) | _like(full, text)
    return _like(full, f"*{text}*")


def _matches(text: str) -> sa.ColumnElement[bool]:
    run_id, sweep = view_runs.c.run_id, view_variants.c.sweep
    if _is_pattern(text):
        return _is_named(text) | _like(run_id, text) | _like(sweep, text)
    return _is_named(text) | (sa.func.substr(run_id, 1, len(text)) == text) | (sweep == text)


_ELSEWHERE = {
    "sweep": view_variants.c.sweep,
    "changed": view_variants.c.changed,
    "bytes": sa.func.coalesce(view_files.c.bytes, 0),
}
_COLUMNS = tuple(
    _ELSEWHERE[name] if name in _ELSEWHERE else view_runs.c[name] for name in RunRow.__struct_fields__
)


def list_runs(store: Store, wanted: Filter | None = None, *, limit: int | None = None) -> list[RunRow]:
    """Runs, newest first."""
    query = (
        sa.select(*_COLUMNS)
        .outerjoin_from(view_runs, view_variants, view_variants.c.run_id == view_runs.c.run_id)
        .outerjoin(view_files, view_files.c.run_id == view_runs.c.run_id)
    )
    query = query.order_by(view_runs.c.submitted_at.desc(), view_runs.c.run_id).limit(limit)
    query = query.where(*(wanted or Filter()).conditions())
    with store.read() as connection:
        try:
            # Rows of the driver: SQLAlchemy's row objects are slow for ten thousand runs.
            return [RunRow(*row) for row in connection.execute(query).cursor.fetchall()]
        except UnicodeEncodeError:
            # An argument that is not UTF-8 has surrogates. No run has such a name.
            return []


def count_runs(store: Store) -> int:
    """The number of runs."""
    with store.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(view_runs)).scalar_one()


def find_run(store: Store, prefix: str) -> Run:
    """The one run that `prefix` means. Raises `RunNotFound` or `AmbiguousRun`."""
    with store.read() as connection:
        return load_run(connection, resolve_id(connection, prefix))


def goodput(store: Store, run_id: str, now: Micros) -> Ledger:
    """How a run spent its time until its end, or until `now` (µs)."""
    with store.read() as connection:
        return read_ledger(connection, run_id, now)


def last_measured(store: Store, run: Run) -> tuple[StepCompleted | None, ValidationCompleted | None]:
    """The run's last step and last validation, if they are those of its state: a resume may have taken them back."""
    validated = -1 if run.last_validation is None else run.last_validation.step
    with store.read() as connection:
        step = event_store.last_step(connection, run.run_id) if run.step else None
        found = event_store.last_of(connection, run.run_id, ValidationCompleted.__name__)
    validation = found.event if found and isinstance(found.event, ValidationCompleted) else None
    return (
        step if step and step.step == run.step else None,
        validation if validation and validation.step == validated else None,
    )


def run_events(
    store: Store, run_id: str, after_version: int = 0, types: tuple[str, ...] = (), limit: int | None = None
) -> list[Recorded]:
    """A run's events in order."""
    with store.read() as connection:
        return list(event_store.read_stream(connection, run_id, after_version, types, limit))


def raw_events(
    store: Store, run_id: str, after_version: int = 0, types: tuple[str, ...] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """A run's raw rows of the events table."""
    with store.read() as connection:
        return list(event_store.raw_rows(connection, run_id, after_version, types, limit))
