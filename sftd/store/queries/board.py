"""Queries that the live screen runs at each refresh. They stay fast as the log grows: they find rows by key, at the end of a
stream, or after the last position read."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from sftd.domain.compare.curves import CurvePoint
from sftd.domain.log.events import Recorded, StepCompleted
from sftd.domain.run.state import Run
from sftd.store.database.tables import NO_STEP, events, view_runs
from sftd.store.log.event_store import to_recorded
from sftd.store.log.runs import decode_state

_point = msgspec.json.Decoder(CurvePoint)


def last_points(
    connection: sa.Connection, run_id: str, after_version: int, limit: int
) -> list[tuple[int, int, CurvePoint]]:
    """(version, occurred_at, step) of the last steps after a version, at most `limit`, oldest first."""
    c = events.c
    query = (
        sa.select(c.version, c.occurred_at, c.payload, c.type)
        .where(c.run_id == run_id, c.version > after_version)
        .order_by(c.version.desc())
        # Some of these rows are not steps. Filtering by type in the database could read the whole stream.
        .limit(2 * limit)
    )
    rows = [row for row in connection.execute(query) if row.type == StepCompleted.__name__]
    return [(row.version, row.occurred_at, _point.decode(row.payload)) for row in reversed(rows[:limit])]


def last_notices(connection: sa.Connection, run_id: str, limit: int) -> list[Recorded]:
    """The last events of a run that are not steps, newest first."""
    query = sa.select(events).where(events.c.run_id == run_id, NO_STEP)
    return [
        to_recorded(row) for row in connection.execute(query.order_by(events.c.version.desc()).limit(limit))
    ]


def notices_between(connection: sa.Connection, after: int, until: int, limit: int) -> list[Recorded]:
    """The last events between two positions that are not steps, newest first."""
    c = events.c
    query = (
        sa.select(events)
        .where(c.position > after, c.position <= until, c.type != StepCompleted.__name__)
        .order_by(c.position.desc())
        .limit(limit)
    )
    return [to_recorded(row) for row in connection.execute(query)]


def states(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, Run]:
    """Run id → state of the runs that the view has. Raises `ViewDamaged`."""
    c = view_runs.c
    query = sa.select(c.run_id, c.state).where(c.run_id.in_(run_ids))
    return {run_id: decode_state(run_id, state) for run_id, state in connection.execute(query)}
