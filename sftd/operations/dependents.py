"""Remove an ended run from the queue, and cancel the runs that wait for its success if it did not succeed."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.run import decisions
from sftd.domain.run.state import Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Tx
from sftd.store.queue import leases, order


def all_dependents(connection: sa.Connection, run_id: str) -> list[str]:
    """The runs that wait for the success of this one, directly or indirectly."""
    found = [run_id]
    for one in found:
        found += [other for other in order.dependents(connection, one) if other not in found]
    return found[1:]


def leave_queue(tx: Tx, context: Context, ended: Run) -> list[str]:
    """Remove an ended run from the queue. If it did not succeed, cancel its direct and indirect dependents. Returns their
    ids."""
    leases.leave(tx, ended.run_id)
    cancelled: list[str] = []
    todo = [ended] if ended.status != "succeeded" else []
    while todo:
        gone = todo.pop()
        for run_id in order.dependents(tx.connection, gone.run_id):
            run = current(tx.connection, run_id)
            reason = f"waits for {gone.run_id}, which {gone.how_it_ended}"
            decided = decisions.request_stop(run, "sftd", reason)
            append_decided(tx, context, run_id, run.version, decided)
            leases.leave(tx, run_id)
            cancelled.append(run_id)
            todo.append(current(tx.connection, run_id))
    return cancelled
