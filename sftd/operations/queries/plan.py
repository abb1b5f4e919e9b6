"""Measurements from the log for a plan, and the comparison of a plan with its run. Nothing here writes."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.compare import plan_outcome
from sftd.domain.compare.plan_outcome import MeasuredRun, Outcome
from sftd.domain.log.events import Micros, RunSubmitted
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.duration import Machine
from sftd.domain.run.goodput import Ledger
from sftd.domain.run.state import Run
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log import event_store
from sftd.store.log.runs import load_run

# The number of newest runs that are used, and the minimum number of steps of each.
_RUNS = 30
_STEPS = 3


def calibration(store: Store, shape: ModelShape, machine: Machine) -> float | None:
    """`plan_outcome.calibration` of the newest runs."""
    with store.read() as connection:
        return plan_outcome.calibration(shape, machine, _earlier(connection, None))


def outcome(store: Store, run: Run, ledger: Ledger) -> Outcome | None:
    """The plan of a run compared with its measurements so far. None before an attempt has loaded its model."""
    if "device" not in run.environment:
        return None
    with store.read() as connection:
        submitted = _submitted(connection, run.run_id)
        if submitted is None:
            return None
        step = event_store.last_step(connection, run.run_id)
        return plan_outcome.outcome(
            run, submitted, step, ledger.held_seconds, _earlier(connection, run.submitted_at)
        )


def _earlier(connection: sa.Connection, before: Micros | None) -> list[MeasuredRun]:
    v = view_runs.c
    query = sa.select(v.run_id).where(v.seconds_per_step.is_not(None), v.step >= _STEPS)
    if before is not None:
        # Only runs that had ended when this one was submitted. The first condition follows from the second, but has an
        # index: without it, the query for an old run scans all newer runs.
        query = query.where(v.submitted_at < before, v.ended_at < before)
    found = []
    for (run_id,) in connection.execute(query.order_by(v.submitted_at.desc()).limit(_RUNS)):
        submitted = _submitted(connection, run_id)
        if submitted is not None:
            found.append(MeasuredRun(load_run(connection, run_id), submitted))
    return found


def _submitted(connection: sa.Connection, run_id: str) -> RunSubmitted | None:
    for recorded in event_store.read_stream(connection, run_id, types=(RunSubmitted.__name__,), limit=1):
        if isinstance(recorded.event, RunSubmitted):
            return recorded.event
    return None
