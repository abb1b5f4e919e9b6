"""A run's curves, read from its stream. Only the plotted and compared fields of a step are decoded."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.compare.curves import TYPES, CurvePoint, RunCurves
from sftd.domain.log import codec
from sftd.domain.log.events import StepCompleted
from sftd.store.database.tables import events

# Every schema version of a step has these fields; a test checks it.
_point = msgspec.json.Decoder(CurvePoint)
# Rows that the driver holds at once. A long run has a hundred megabytes of rows.
_PAGE = 5000


def advance(
    connection: sa.Connection,
    run_id: str,
    history: RunCurves,
    until_version: int | None = None,
    limit: int | None = None,
) -> int:
    """Add the next events of a run to `history`, up to `until_version` and at most `limit`. Returns the number of events."""
    c = events.c
    query = (
        sa.select(c.version, c.type, c.schema_version, c.occurred_at, c.payload)
        .where(c.run_id == run_id, c.version > history.version, c.type.in_(TYPES))
        .order_by(c.version)
        .limit(limit)
    )
    if until_version is not None:
        query = query.where(c.version <= until_version)
    count = 0
    with connection.execute(query, execution_options={"yield_per": _PAGE}) as rows:
        for version, name, schema_version, occurred_at, payload in rows:
            if name == StepCompleted.__name__:
                history.add(version, occurred_at, _point.decode(payload))
            else:
                history.add(version, occurred_at, codec.decode(name, schema_version, payload))
            count += 1
    return count
