"""Read the log for MLflow: the mirrored event types, a run as of a version, and all points of a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.run.fold import fold
from sftd.domain.run.goodput import Ledger
from sftd.domain.run.state import Run
from sftd.projections.mirrors.mlflow import mapping
from sftd.store.database.engine import Store
from sftd.store.database.tables import NO_STEP, events
from sftd.store.log.event_store import read_stream
from sftd.store.log.goodput import read_ledger

# Rows of a stream that are read and decoded at once.
PAGE = 1000
STEPS = (e.StepCompleted.__name__, e.ValidationCompleted.__name__)
ENDS = (e.RunSucceeded.__name__, e.RunFailed.__name__, e.RunCancelled.__name__)
_SAMPLES = e.SampleGenerated.__name__
_SYSTEM = e.SystemSampled.__name__
_LIFECYCLE = e.names(*e.types_where("is_lifecycle"))
# Other types are not decoded, because a newer sftd may have written them.
MIRRORED = (*_LIFECYCLE, *STEPS, _SAMPLES, _SYSTEM, e.EvaluationCompleted.__name__)


def recover(connection: sa.Connection, run_id: str, cursor: int) -> tuple[Run, dict[str, int]]:
    """The run as of `cursor` and its highest step by event type, without reading all of its steps.

    Steps grow within an attempt, so the last event of each attempt has its highest step, and is enough to determine the
    run's state.
    """
    if cursor == 0:
        return Run(run_id), {}
    lifecycle = read_stream(connection, run_id, types=_LIFECYCLE)
    recorded = list(takewhile(lambda r: r.version <= cursor, lifecycle))
    c = events.c
    last = (
        sa.select(sa.func.max(c.version))
        .where(c.run_id == run_id, c.version <= cursor, c.type.in_(STEPS))
        .group_by(c.type, c.attempt)
    )
    for version in connection.execute(last).scalars().all():
        recorded += read_stream(connection, run_id, version - 1, limit=1)
    recorded.sort(key=lambda r: r.version)
    highest: dict[str, int] = {}
    for r in recorded:
        mapping.points(r, highest)
    sampled = sa.select(sa.func.count()).where(
        c.run_id == run_id, c.version <= cursor, c.type == _SYSTEM, NO_STEP
    )
    highest[_SYSTEM] = connection.execute(sampled).scalar_one() - 1
    return fold(Run(run_id), recorded), highest


def samples(connection: sa.Connection, run_id: str, version: int) -> list[e.SampleGenerated]:
    """The answers to sample prompts up to `version`."""
    recorded = read_stream(connection, run_id, types=(_SAMPLES,))
    upto = takewhile(lambda r: r.version <= version, recorded)
    return [r.event for r in upto if isinstance(r.event, e.SampleGenerated)]


def inherited(store: Store, recorded: e.Recorded, forked: e.RunForked) -> Iterator[mapping.MetricPoint]:
    """The points of the parent and its ancestors up to the fork, equal to those in their own MLflow runs.

    Only events before the fork count, so that the points are the same whenever they are sent.
    """
    highest: dict[str, int] = {}
    for r in _stream(store, forked.parent, 0, None, (e.RunForked.__name__, *STEPS)):
        if isinstance(r.event, e.RunForked):
            yield from inherited(store, r, r.event)
        elif r.position < recorded.position:
            yield from mapping.inherited(r, highest, forked.step)


def history(store: Store, run_id: str, version: int) -> Iterator[mapping.MetricPoint]:
    """All points that MLflow has of a run when it is mirrored up to `version`."""
    highest = dict[str, int]()
    for r in _stream(store, run_id, 0, version, MIRRORED):
        if isinstance(r.event, e.RunForked):
            yield from inherited(store, r, r.event)
        yield from mapping.points(r, highest)


def ledger(store: Store, end: e.Recorded) -> Ledger:
    """The time ledger of a run up to one of its ends, which does not depend on when it is sent."""
    with store.read() as connection:
        return read_ledger(connection, end.run_id, end.occurred_at, end.version)


def last_end(connection: sa.Connection, run_id: str, version: int) -> e.Recorded | None:
    """The last end event of a run up to `version`."""
    ends = takewhile(lambda r: r.version <= version, read_stream(connection, run_id, types=ENDS))
    return max(ends, key=lambda r: r.version, default=None)


def _stream(
    store: Store, run_id: str, after: int, until: int | None, types: tuple[str, ...]
) -> Iterator[e.Recorded]:
    """Events of a run, read in pages. No transaction is open while the caller handles them."""
    while True:
        with store.read() as connection:
            page = list(read_stream(connection, run_id, after, types, PAGE))
        yield from (r for r in page if until is None or r.version <= until)
        if len(page) < PAGE or (until is not None and page[-1].version >= until):
            return
        after = page[-1].version
