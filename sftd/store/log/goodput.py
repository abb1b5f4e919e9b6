"""The goodput ledger of one run: the fold in the view, advanced by the later events of the run's stream.

The index (run_id, version) finds the rows of a run, the database filters event types that do not affect the ledger, and only
two numbers of each step are decoded: 2 to 10 µs per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import ViewDamaged
from sftd.domain.log import codec
from sftd.domain.log.events import Micros, StepCompleted
from sftd.domain.run import goodput
from sftd.domain.run.goodput import Fold, Ledger, StepTime
from sftd.store.database.tables import events, view_goodput

_BATCH = 10_000
# Every schema version of a step has these two fields; a test checks it.
_step = msgspec.json.Decoder(StepTime)
_fold = msgspec.json.Decoder(Fold)


def read_ledger(
    connection: sa.Connection, run_id: str, now: Micros, until_version: int | None = None
) -> Ledger:
    """Where a run's time went up to `until_version` (None: all events), until its end, or until `now` if it has not ended."""
    fold, version = read_fold(connection, run_id) if until_version is None else (Fold(), 0)
    advance(connection, run_id, fold, version, until_version)
    return fold.ledger(now)


def read_fold(connection: sa.Connection, run_id: str) -> tuple[Fold, int]:
    """The view's fold of a run and the version of its last event; an empty fold and 0 if the view has none."""
    return read_folds(connection, [run_id]).get(run_id) or (Fold(), 0)


def read_folds(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, tuple[Fold, int]]:
    """Run id → (fold, version) of the runs that the view has. Raises `ViewDamaged`."""
    c = view_goodput.c
    query = sa.select(c.run_id, c.fold, c.version).where(c.run_id.in_(run_ids))
    return {row.run_id: (_decode(row.run_id, row.fold), row.version) for row in connection.execute(query)}


def _decode(run_id: str, fold: str) -> Fold:
    try:
        return _fold.decode(fold)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise ViewDamaged(view_goodput.name, run_id, error) from None


def advance(
    connection: sa.Connection, run_id: str, fold: Fold, after_version: int, until_version: int | None = None
) -> int:
    """Add the events of a run after `after_version` to `fold`. Returns the version of the last one."""
    c = events.c
    query = (
        sa.select(c.version, c.type, c.schema_version, c.occurred_at, c.payload)
        .where(c.run_id == run_id, c.version > after_version, c.type.in_(goodput.TYPES))
        .order_by(c.version)
    )
    if until_version is not None:
        query = query.where(c.version <= until_version)
    # In batches: a run older than this view may have millions of steps. Decoding all of them at once would exceed the
    # server's idle limit for writers (`engine.IDLE_SECONDS`).
    query = query.execution_options(yield_per=_BATCH)
    for version, name, schema_version, occurred_at, payload in connection.execute(query):
        if name == StepCompleted.__name__:
            fold.add(occurred_at, _step.decode(payload))
        else:
            fold.add(occurred_at, codec.decode(name, schema_version, payload))
        after_version = version
    return after_version
