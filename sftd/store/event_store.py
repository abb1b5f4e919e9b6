"""The log: append with optimistic concurrency, read by stream or by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from sftd.domain import codec
from sftd.domain.errors import ConcurrencyConflict
from sftd.domain.events import Micros, NewEvent, Recorded
from sftd.store.engine import Tx
from sftd.store.tables import events, view_runs

_BATCH = 1000


def append(
    tx: Tx, run_id: str, expected_version: int, new: Sequence[NewEvent], recorded_at: Micros
) -> list[Recorded]:
    """Append events to a run's stream, which must be at `expected_version` (0 is a new stream).

    Positions grow in commit order. Raises `ConcurrencyConflict` when the stream has another version.
    """
    if not new:
        return []
    found = (
        tx.execute(sa.select(sa.func.max(events.c.version)).where(events.c.run_id == run_id)).scalar() or 0
    )
    if found != expected_version:
        raise ConcurrencyConflict(
            f"{run_id} is at version {found}, not {expected_version}: it has changed meanwhile"
        )
    rows = []
    for version, item in enumerate(new, expected_version + 1):
        name, schema_version, payload = codec.encode(item.event)
        rows.append(
            {
                "event_id": item.event_id,
                "run_id": run_id,
                "version": version,
                "type": name,
                "schema_version": schema_version,
                "occurred_at": item.occurred_at,
                "recorded_at": recorded_at,
                "attempt": item.attempt,
                "actor": item.actor,
                "causation_id": item.causation_id,
                "payload": payload,
            }
        )
    tx.execute(sa.insert(events), rows)
    tx.appended = True
    query = (
        sa.select(events)
        .where(events.c.run_id == run_id, events.c.version > expected_version)
        .order_by(events.c.version)
    )
    return [_recorded(row) for row in tx.execute(query)]


def _recorded(row: sa.Row[Any]) -> Recorded:
    return Recorded(
        position=row.position,
        event_id=row.event_id,
        run_id=row.run_id,
        version=row.version,
        type=row.type,
        schema_version=row.schema_version,
        occurred_at=row.occurred_at,
        recorded_at=row.recorded_at,
        attempt=row.attempt,
        actor=row.actor,
        causation_id=row.causation_id,
        event=codec.decode(row.type, row.schema_version, row.payload),
    )


def _stream(run_id: str, after_version: int, types: Sequence[str], limit: int | None) -> sa.Select[Any]:
    query = sa.select(events).where(events.c.run_id == run_id, events.c.version > after_version)
    if types:
        query = query.where(events.c.type.in_(types))
    return query.order_by(events.c.version).limit(limit)


def read_stream(
    connection: sa.Connection,
    run_id: str,
    after_version: int = 0,
    types: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[Recorded]:
    """Events of one run in order, optionally of some types only."""
    for row in connection.execute(_stream(run_id, after_version, types, limit)):
        yield _recorded(row)


def first_events(connection: sa.Connection, type_name: str) -> list[Recorded]:
    """The first event of each run where it is of this type. Costs a look at each run, not at each event."""
    query = sa.select(events).join(
        view_runs, sa.and_(events.c.run_id == view_runs.c.run_id, events.c.version == 1)
    )
    return [_recorded(row) for row in connection.execute(query.where(events.c.type == type_name))]


def read_all(connection: sa.Connection, after_position: int = 0, limit: int = _BATCH) -> list[Recorded]:
    """The next events of all runs in commit order."""
    query = (
        sa.select(events).where(events.c.position > after_position).order_by(events.c.position).limit(limit)
    )
    return [_recorded(row) for row in connection.execute(query)]


def last_position(connection: sa.Connection) -> int:
    """The highest position in the log; 0 when it is empty."""
    return connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0


def event_types(connection: sa.Connection, run_id: str) -> dict[str, str]:
    """Event id → type name, of one run's events in order; nothing is decoded."""
    query = sa.select(events.c.event_id, events.c.type).where(events.c.run_id == run_id)
    return {row.event_id: row.type for row in connection.execute(query.order_by(events.c.version))}


def raw_rows(
    connection: sa.Connection,
    run_id: str,
    after_version: int = 0,
    types: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the events table of one run as they stand there, for people and scripts."""
    for row in connection.execute(_stream(run_id, after_version, types, limit)):
        yield {str(name): value for name, value in row._mapping.items()}
