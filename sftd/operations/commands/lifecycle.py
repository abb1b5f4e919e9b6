"""Commands that begin and end runs: cancel, abandon, resume, fork."""

from __future__ import annotations

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.log.events import CheckpointPinned
from sftd.domain.run import decisions
from sftd.domain.run.decisions import Proposal
from sftd.domain.run.state import ENDED, Run
from sftd.domain.spec.spec import Spec
from sftd.operations.commands.submit import new_run_id
from sftd.operations.context import Context, append_decided, current
from sftd.operations.dependents import all_dependents, leave_queue
from sftd.operations.driving import checkpoints
from sftd.store.database.engine import Store
from sftd.store.queries.resolve import resolve_id
from sftd.store.queue import leases, order
from sftd.wire import preflight
from sftd.wire.preflight import Preflight


class Ending(msgspec.Struct, frozen=True):
    """A run that has ended or was asked to end, and the runs that are cancelled with it because they wait for its success."""

    run: Run
    dependents: list[str]


def cancel(
    store: Store, context: Context, prefix: str, by: str, reason: str = "", *, now: bool = False
) -> Ending:
    """Request the end of a run. A waiting run ends at once. The daemon of an active run stops it after a checkpoint; with
    `now` the daemon kills it."""
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        decided = decisions.request_stop(run, by, reason, now=now)
        append_decided(tx, context, run.run_id, run.version, decided, run.attempt or None)
        run = current(tx.connection, run.run_id)
        if run.status in ENDED:
            return Ending(run, leave_queue(tx, context, run))
        return Ending(run, all_dependents(tx.connection, run.run_id))


def abandon(store: Store, context: Context, prefix: str, by: str) -> Ending:
    """Cancel a run whose daemon will not come back (another host name, a moved home). Raises `Refused` until its lease has
    expired."""
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        expires_at = leases.expires_at(tx.connection, run.run_id)
        if expires_at is not None and expires_at > tx.now(context.now()):
            what = f"is driven by the living daemon {run.daemon}"
            raise Refused(
                Problem(run.run_id, what, f"use `sftd cancel {run.run_id}`, or stop that daemon first")
            )
        append_decided(tx, context, run.run_id, run.version, decisions.abandon(run, by), run.attempt or None)
        run = current(tx.connection, run.run_id)
        return Ending(run, leave_queue(tx, context, run))


def resume(
    store: Store,
    context: Context,
    prefix: str,
    by: str,
    from_step: int | None = None,
    new: Proposal | None = None,
    instead: str = "",
    *,
    host: str = "",
) -> Run:
    """Queue another attempt of a run that waits after a failure, is paused or has ended, with the spec of `new` if given (see
    `decisions.request_resume`).

    On the host that drove the run last, checkpoints whose folder or manifest is missing are not used. Without `from_step`, the
    request then names the newest that exists.
    """
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        decided = decisions.request_resume(run, by, from_step, new, instead)
        missing = checkpoints.missing_here(tx.connection, run, host)
        if (instead_of := decisions.without_missing(run, from_step, missing)) != from_step:
            decided = decisions.request_resume(run, by, instead_of, new, instead)
        append_decided(tx, context, run.run_id, run.version, decided)
        run = current(tx.connection, run.run_id)
        leases.wait_again(tx, run.run_id, tx.now(context.now()), priority=run.spec.launch.priority)
        order.set_demand(tx, run.run_id, run.spec)
        return run


def fork(
    store: Store,
    context: Context,
    parent_id: str,
    step: int | None,
    spec: Spec,
    found: Preflight,
    warnings: list[Problem],
    user: str,
) -> str:
    """Record a run that starts from a checkpoint of another run, pin that checkpoint, and queue the new run. Returns its id."""
    submitted = preflight.submission(spec, found, warnings, user)
    with store.write() as tx:
        run_id = new_run_id(tx, context)
        parent = current(tx.connection, parent_id)
        forked = decisions.fork(parent, user, step, preflight.proposal(spec, found))
        append_decided(tx, context, run_id, 0, [forked, submitted])
        if forked.checkpoint is not None:
            pin = CheckpointPinned(step=forked.step, fork=run_id)
            append_decided(tx, context, parent_id, parent.version, [pin])
        leases.enqueue(tx, run_id, spec.launch.priority, tx.now(context.now()))
        order.set_demand(tx, run_id, spec)
    return run_id
