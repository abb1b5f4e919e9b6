"""The log: append with optimistic concurrency, read by stream or by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from sftd.domain.errors import ConcurrencyConflict
from sftd.domain.log import codec
from sftd.domain.log.events import CheckpointPublished, Micros, NewEvent, Recorded, RunForked, StepCompleted
from sftd.store.database.engine import Tx, insert_rows
from sftd.store.database.tables import NO_STEP, events, view_runs

_BATCH = 1000
# The database assigns the position.
_INSERTED = [column.name for column in events.columns if column.name != "position"]


def append(
    tx: Tx, run_id: str, expected_version: int, new: Sequence[NewEvent], recorded_at: Micros
) -> list[Recorded]:
    """Append events to a run's stream, which must be at `expected_version` (0: a new stream).

    Positions grow in commit order. Raises `ConcurrencyConflict` when the stream has another version.
    """
    if not new:
        return []
    found = (
        tx.execute(sa.select(sa.func.max(events.c.version)).where(events.c.run_id == run_id)).scalar() or 0
    )
    if found != expected_version:
        raise ConcurrencyConflict(
            f"{run_id} is at version {found}, not {expected_version}: another process has changed it"
        )
    rows = []
    for version, item in enumerate(new, expected_version + 1):
        name, schema, payload = codec.encode(item.event)
        rows.append(
            (
                item.event_id,
                run_id,
                version,
                name,
                schema,
                item.occurred_at,
                recorded_at,
                item.attempt,
                item.actor,
                item.causation_id,
                payload,
            )
        )
    insert_rows(tx.connection, events, _INSERTED, rows)
    query = (
        sa.select(events.c.position)
        .where(events.c.run_id == run_id, events.c.version > expected_version)
        .order_by(events.c.version)
    )
    # Decoded from the rows instead of reusing `new`: the caller gets exactly the events that later readers get.
    recorded = [
        to_recorded((position, *row)) for position, row in zip(tx.execute(query).scalars(), rows, strict=True)
    ]
    tx.appended += recorded
    return recorded


def to_recorded(row: Sequence[Any]) -> Recorded:
    """The event of a full row of the events table, columns in table order. Raises `UnknownEvent`."""
    (
        position,
        event_id,
        run_id,
        version,
        name,
        schema,
        occurred_at,
        recorded_at,
        attempt,
        actor,
        cause,
        payload,
    ) = row
    return Recorded(
        position=position,
        event_id=event_id,
        run_id=run_id,
        version=version,
        type=name,
        schema_version=schema,
        occurred_at=occurred_at,
        recorded_at=recorded_at,
        attempt=attempt,
        actor=actor,
        causation_id=cause,
        event=codec.decode(name, schema, payload),
    )


def of_run(run_id: str, after_version: int, types: Sequence[str], limit: int | None) -> sa.Select[Any]:
    """The query for a run's rows in order. If `types` has no steps, an index skips them."""
    query = sa.select(events).where(events.c.run_id == run_id, events.c.version > after_version)
    if types:
        query = query.where(events.c.type.in_(types))
        if StepCompleted.__name__ not in types:
            query = query.where(NO_STEP)
    return query.order_by(events.c.version).limit(limit)


def read_stream(
    connection: sa.Connection,
    run_id: str,
    after_version: int = 0,
    types: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[Recorded]:
    """Events of one run in order, optionally of some types only."""
    for row in connection.execute(of_run(run_id, after_version, types, limit)):
        yield to_recorded(row)


def branch_version(connection: sa.Connection, fork: RunForked) -> int | None:
    """The version of the parent's stream at which a fork branches: the last publication of the fork's checkpoint. Later
    events of the parent do not belong to the fork. None for a fork of the pretrained model and for a checkpoint that the log
    does not have."""
    query = of_run(fork.parent, 0, (CheckpointPublished.__name__,), None).order_by(None)
    for row in connection.execute(query.order_by(events.c.version.desc())):
        event = to_recorded(row).event
        if isinstance(event, CheckpointPublished) and event.manifest_digest == fork.manifest_digest:
            return int(row.version)
    return None


def last_of(connection: sa.Connection, run_id: str, type_name: str) -> Recorded | None:
    """A run's last event of a type. Fast if that event is near the end of the stream, steps aside."""
    c = events.c
    query = sa.select(events).where(c.run_id == run_id, c.type == type_name)
    if type_name != StepCompleted.__name__:
        query = query.where(NO_STEP)
    row = connection.execute(query.order_by(c.version.desc()).limit(1)).first()
    return None if row is None else to_recorded(row)


def last_step(connection: sa.Connection, run_id: str) -> StepCompleted | None:
    """The last step that a run's log has; it may be taken back."""
    found = last_of(connection, run_id, StepCompleted.__name__)
    return found.event if found is not None and isinstance(found.event, StepCompleted) else None


def read_types(connection: sa.Connection, run_ids: Sequence[str], types: Sequence[str]) -> list[Recorded]:
    """Events of several runs and some types, in commit order. Steps are excluded."""
    c = events.c
    query = sa.select(events).where(c.run_id.in_(run_ids), c.type.in_(types), NO_STEP).order_by(c.position)
    return [to_recorded(row) for row in connection.execute(query)]


def first_events(connection: sa.Connection, type_name: str) -> list[Recorded]:
    """The first event of each run whose first event has this type. The cost grows with the number of runs, not of events."""
    query = sa.select(events).join(
        view_runs, sa.and_(events.c.run_id == view_runs.c.run_id, events.c.version == 1)
    )
    return [to_recorded(row) for row in connection.execute(query.where(events.c.type == type_name))]


def read_all(connection: sa.Connection, after_position: int = 0, limit: int = _BATCH) -> list[Recorded]:
    """The next events of all runs in commit order."""
    query = (
        sa.select(events).where(events.c.position > after_position).order_by(events.c.position).limit(limit)
    )
    return [to_recorded(row) for row in connection.execute(query)]


def read_types_after(
    connection: sa.Connection, after_position: int, types: Sequence[str], limit: int
) -> list[Recorded]:
    """The next events of some types, in commit order."""
    c = events.c
    query = sa.select(events).where(c.position > after_position, c.type.in_(types))
    return [to_recorded(row) for row in connection.execute(query.order_by(c.position).limit(limit))]


def any_between(connection: sa.Connection, after: int, before: int) -> bool:
    """Whether there is an event between two positions, both exclusive."""
    query = sa.select(events.c.position).where(events.c.position > after, events.c.position < before)
    return connection.execute(query.limit(1)).first() is not None


def last_position(connection: sa.Connection) -> int:
    """The highest position in the log; 0 when it is empty."""
    return connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0


def event_types(connection: sa.Connection, run_id: str) -> dict[str, str]:
    """Event id → type name of one run's events, in order, without decoding payloads."""
    query = sa.select(events.c.event_id, events.c.type).where(events.c.run_id == run_id)
    return {row.event_id: row.type for row in connection.execute(query.order_by(events.c.version))}


def raw_rows(
    connection: sa.Connection,
    run_id: str,
    after_version: int = 0,
    types: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of one run in the events table, undecoded, for users and scripts."""
    for row in connection.execute(of_run(run_id, after_version, types, limit)):
        yield {str(name): value for name, value in row._mapping.items()}
