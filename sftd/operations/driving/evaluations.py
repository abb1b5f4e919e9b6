"""A daemon's operations on evaluations. A start is recorded once, in one transaction, so two daemons never start the same. The
stream version of the start is the token: every later write checks it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.log.events import Micros
from sftd.domain.run import early_stop
from sftd.domain.run import evaluations as decisions
from sftd.domain.run.state import CheckpointInfo, EvaluationState, Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_evaluations
from sftd.store.log.runs import load_run
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow


class Evaluated(msgspec.Struct, frozen=True):
    """A checkpoint and an evaluation of it, in a state of the run."""

    run: Run
    state: EvaluationState
    checkpoint: CheckpointInfo


def _read(connection: sa.Connection, status: str) -> list[Evaluated]:
    c = view_evaluations.c
    query = sa.select(c.run_id, c.name, c.step).where(c.status == status).order_by(c.since, c.run_id, c.step)
    runs: dict[str, Run] = {}
    found = []
    for run_id, name, step in connection.execute(query):
        run = runs.get(run_id) or runs.setdefault(run_id, load_run(connection, run_id))
        state, checkpoint = run.evaluation_of(name, step), decisions.checkpoint_of(run, step)
        if state is not None and checkpoint is not None:
            found.append(Evaluated(run, state, checkpoint))
    return found


def waiting(store: Store) -> list[Evaluated]:
    """Every evaluation that waits, the longest waiting first."""
    with store.read() as connection:
        return _read(connection, "pending")


def start(
    store: Store, context: Context, wanted: Evaluated, *, daemon: str, devices: list[str]
) -> Evaluated | None:
    """Record that `daemon` starts an evaluation. None if it no longer waits, or its checkpoint is gone
    or elsewhere."""
    with store.write() as tx:
        run = current(tx.connection, wanted.run.run_id)
        name, step = wanted.state.name, wanted.state.step
        state, checkpoint = run.evaluation_of(name, step), decisions.checkpoint_of(run, step)
        if state is None or state.status != "pending" or checkpoint is None:
            return None
        if checkpoint.path != wanted.checkpoint.path:
            # It was reduced to its weights in the meantime, and the caller keeps the old folder from being deleted.
            return None
        started = e.EvaluationStarted(
            name=name,
            step=step,
            checkpoint=checkpoint.path,
            manifest_digest=checkpoint.manifest_digest,
            daemon=daemon,
            devices=devices,
        )
        append_decided(tx, context, run.run_id, run.version, [started])
        run = current(tx.connection, run.run_id)
        now_running = run.evaluation_of(name, step)
        return None if now_running is None else Evaluated(run, now_running, checkpoint)


def is_current(store: Store, started: Evaluated) -> bool:
    """Whether the start is still the evaluation's last: no user cancelled it, and the run did not go back to before it."""
    with store.read() as connection:
        return _is_current(load_run(connection, started.run.run_id), started)


def _is_current(run: Run, started: Evaluated) -> bool:
    state = run.evaluation_of(started.state.name, started.state.step)
    return state is not None and (state.status, state.started) == ("running", started.state.started)


def end(
    store: Store,
    context: Context,
    started: Evaluated,
    event: e.EvaluationCompleted | e.EvaluationFailed | e.EvaluationInterrupted,
) -> bool:
    """Record the end of a started evaluation. Returns False, and records nothing, if the start is not the last one any more."""
    with store.write() as tx:
        run = current(tx.connection, started.run.run_id)
        if not _is_current(run, started):
            return False
        append_decided(tx, context, run.run_id, run.version, [event])
        run = current(tx.connection, run.run_id)
        if decided := early_stop.evaluated(run):
            append_decided(tx, context, run.run_id, run.version, decided, run.attempt)
        return True


def lost(
    store: Store, now: Micros, is_gone: Callable[[str, DaemonRow | None, Micros], bool]
) -> list[Evaluated]:
    """The running evaluations whose daemon is gone, according to `is_gone` of its id, its row and the database's time. The
    processes of an evaluation end with its daemon."""
    with store.read() as connection:
        now = store.clock(connection, now)
        running = _read(connection, "running")
        return [x for x in running if is_gone(x.state.daemon, daemons.find(connection, x.state.daemon), now)]
