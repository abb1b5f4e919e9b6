"""A daemon's operations on attempts. Every write checks the lease's token and raises `LeaseLost` if another daemon has the
lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from sftd.domain.errors import LeaseLost
from sftd.domain.log import events as e
from sftd.domain.log import timeline
from sftd.domain.log.model_record import ModelRecord
from sftd.domain.queue.order import Limits
from sftd.domain.repro.steps import steps_to_redo
from sftd.domain.run import decisions, early_stop, exactness, loss_watch
from sftd.domain.run.early_stop import Patience
from sftd.domain.run.failures import Failure, Interruption
from sftd.domain.run.state import ENDED, Run
from sftd.operations.context import Context, append_decided, current
from sftd.operations.dependents import leave_queue
from sftd.operations.driving.turns import NO_LIMITS, Fits, next_turn
from sftd.operations.queries.model_files import read_record
from sftd.store.database.engine import Store, Tx
from sftd.store.log import event_store, positions
from sftd.store.queue import leases as lease_store
from sftd.store.queue.leases import Lease
from sftd.wire.attempt import journal
from sftd.wire.attempt.journal import Line


class Claimed(msgspec.Struct, frozen=True):
    """A new lease, the run's state before it, where the attempt starts, and the log's record of the model folder."""

    lease: Lease
    run: Run
    start: e.AttemptClaimed
    model: ModelRecord


def claim(
    store: Store,
    context: Context,
    *,
    daemon: str,
    host: str,
    fits: Fits,
    lease_micros: int,
    limits: Limits = NO_LIMITS,
) -> Claimed | None:
    """Lease the run whose turn it is and record the claim. Returns None when no run can start.

    A run that waits for devices keeps its turn: smaller runs do not overtake it, so a large run cannot starve.
    """
    with store.read() as connection:
        # Most of the time no run can start, and a read transaction finds that without blocking writers.
        turn = next_turn(connection, store.clock(connection, context.now()), fits, limits)
        if turn is None or not turn.fits:
            return None
    with store.write() as tx:
        now = tx.now(context.now())
        turn = next_turn(tx.connection, now, fits, limits)
        if turn is None or not turn.fits:
            return None
        run = current(tx.connection, turn.entry.run_id)
        start = decisions.claim(run, daemon, host)
        lease = Lease(run.run_id, run.attempt + 1, context.new_id(), daemon, now + lease_micros)
        lease_store.lease(tx, run.run_id, lease.attempt, lease.token, daemon, lease.expires_at)
        append_decided(tx, context, run.run_id, run.version, [start], lease.attempt)
        return Claimed(lease, run, start, read_record(tx.connection, run.run_id))


def launched(store: Store, context: Context, lease: Lease, event: e.AttemptLaunched) -> None:
    """Record that the attempt's processes were started. Idempotent: a caller whose database connection failed during the
    commit calls again."""
    with store.read() as connection:
        known = event_store.read_types(connection, [lease.run_id], (e.AttemptLaunched.__name__,))
    if not any(r.attempt == lease.attempt for r in known):
        _append_leased(store, context, lease, event)


def sampled(store: Store, context: Context, lease: Lease, event: e.SystemSampled) -> None:
    """Record a sample of the attempt's host."""
    _append_leased(store, context, lease, event)


def job_reported(store: Store, context: Context, lease: Lease, event: e.JobReported) -> None:
    """Record the job state that the resource manager reports."""
    _append_leased(store, context, lease, event)


def adopt(store: Store, context: Context, old: Lease, event: e.AttemptAdopted, lease_micros: int) -> Lease:
    """Take over an attempt from a daemon that is gone."""
    with store.write() as tx:
        run = current(tx.connection, old.run_id)
        lease = Lease(
            old.run_id, old.attempt, context.new_id(), event.daemon, tx.now(context.now()) + lease_micros
        )
        if not lease_store.take_over(tx, old, lease.token, lease.owner, lease.expires_at):
            raise LeaseLost
        append_decided(tx, context, lease.run_id, run.version, [event], lease.attempt)
        return lease


def _append_leased(store: Store, context: Context, lease: Lease, event: e.Event) -> None:
    with store.write() as tx:
        lease_store.check(tx, lease.run_id, lease.token)
        run = current(tx.connection, lease.run_id)
        append_decided(tx, context, lease.run_id, run.version, [event], lease.attempt)


def steps_before(store: Store, lease: Lease) -> dict[int, e.StepCompleted]:
    """The recorded steps that the attempt must reproduce, by step."""
    if lease.attempt == 1:
        return {}
    with store.read() as connection:
        recorded = event_store.read_stream(connection, lease.run_id, types=timeline.TYPES)
        return steps_to_redo(r.event for r in recorded)


def losses_before(store: Store, run_id: str, step: int) -> list[float]:
    """The losses from which the trainer's spike detection continues after the checkpoint of `step`."""
    with store.read() as connection:
        recorded = event_store.read_stream(connection, run_id, types=loss_watch.TYPES)
        return loss_watch.losses_before((r.event for r in recorded), step)


def patience_before(store: Store, run: Run, step: int) -> Patience:
    """The patience with which early stopping by the validation loss continues after the checkpoint of `step`."""
    with store.read() as connection:
        recorded = event_store.read_stream(connection, run.run_id, types=early_stop.TYPES)
        return early_stop.before((r.event for r in recorded), run, step)


class Taken(msgspec.Struct, frozen=True):
    """Lines of an attempt's journal. The last ends at `byte_offset`. Redone steps are compared with `before` (see
    `steps_before`)."""

    lease: Lease
    lines: list[Line]
    byte_offset: int
    before: Mapping[int, e.StepCompleted]


def record(
    store: Store,
    context: Context,
    lease: Lease,
    lines: list[Line],
    byte_offset: int,
    before: Mapping[int, e.StepCompleted],
) -> list[e.Recorded]:
    """Ingest lines of one journal exactly once. Returns the appended events."""
    (recorded,) = record_all(store, context, [Taken(lease, lines, byte_offset, before)])
    return recorded


def record_all(store: Store, context: Context, batch: Sequence[Taken]) -> list[list[e.Recorded]]:
    """Ingest lines of several attempts' journals exactly once, in one transaction: one commit and one update of the views for
    all. Records nothing if one of the leases is lost. Returns the appended events."""
    if not any(taken.lines for taken in batch):
        return [[] for _ in batch]
    with store.write() as tx:
        return [_record(tx, context, taken) if taken.lines else [] for taken in batch]


def _record(tx: Tx, context: Context, taken: Taken) -> list[e.Recorded]:
    lease, lines = taken.lease, taken.lines
    lease_store.check(tx, lease.run_id, lease.token)
    run = current(tx.connection, lease.run_id)
    cursor, _ = positions.journal_cursor(tx.connection, lease.run_id, lease.attempt)
    new: list[e.NewEvent] = []
    for line in lines:
        if line.number <= cursor:
            continue
        item = e.NewEvent(
            event=line.event,
            event_id=journal.event_id(lease.run_id, lease.attempt, line.number),
            occurred_at=line.occurred_at,
            actor="trainer",
            attempt=lease.attempt,
        )
        new.append(item)
        if isinstance(line.event, e.ModelLoaded):
            run = exactness.at_load(run, line.event)
        redone = exactness.compare_with_log(taken.before, run, line.event)
        if redone is not None and (anomaly := redone.anomaly):
            new.append(
                msgspec.structs.replace(
                    item,
                    event=anomaly,
                    event_id=context.new_id(),
                    actor=context.actor,
                    causation_id=item.event_id,
                )
            )
    recorded = event_store.append(tx, lease.run_id, run.version, new, context.now())
    positions.set_journal_cursor(tx, lease.run_id, lease.attempt, lines[-1].number, taken.byte_offset)
    return recorded


def reject_journal(store: Store, context: Context, lease: Lease, what: str) -> None:
    """Record that the rest of an attempt's journal is unreadable."""
    _append_leased(store, context, lease, e.AnomalyDetected(step=0, what=what))


def finish(
    store: Store,
    context: Context,
    lease: Lease,
    *,
    exit_code: int | None,
    failure: Failure,
    lost: bool,
    backoff_seconds: float,
    interruption: Interruption | None = None,
) -> Run:
    """Record the end of an attempt whose processes are gone and whose journal is ingested. Ends or pauses the run, or queues
    its next attempt."""
    with store.write() as tx:
        lease_store.check(tx, lease.run_id, lease.token)
        run = current(tx.connection, lease.run_id)
        now = context.now()
        decided = decisions.end_attempt(
            run,
            exit_code=exit_code,
            failure=failure,
            lost=lost,
            now=now,
            backoff_base=backoff_seconds,
            interruption=interruption,
        )
        append_decided(tx, context, run.run_id, run.version, decided, lease.attempt)
        run = current(tx.connection, lease.run_id)
        if run.status in ENDED:
            leave_queue(tx, context, run)
        elif run.status == "paused":
            lease_store.leave(tx, run.run_id)
        else:
            # The back-off is relative: this host's clock may differ from the database's.
            wait = max(0, run.retry_at - now) if run.retry_at else 0
            lease_store.wait_again(tx, run.run_id, tx.now(now) + wait)
        return run


def renew(store: Store, context: Context, leases: list[Lease], lease_micros: int) -> list[Lease]:
    """Renew leases. Returns those that were lost."""
    with store.write(appends=False) as tx:
        held = lease_store.renew(tx, [lease.token for lease in leases], tx.now(context.now()) + lease_micros)
    return [lease for lease in leases if lease.token not in held]
