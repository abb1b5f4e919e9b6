"""Commands that stop a run without ending it: hold, release, pause."""

from __future__ import annotations

from sftd.domain.run import stops
from sftd.domain.run.state import Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store
from sftd.store.queries.resolve import resolve_id
from sftd.store.queue import leases


def hold(store: Store, context: Context, prefix: str, by: str, reason: str = "") -> Run:
    """Keep a waiting run from starting until it is released."""
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        append_decided(tx, context, run.run_id, run.version, stops.hold(run, by, reason))
        leases.hold(tx, run.run_id)
        return current(tx.connection, run.run_id)


def release(store: Store, context: Context, prefix: str, by: str) -> Run:
    """Return a held run to its old place in the queue."""
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        append_decided(tx, context, run.run_id, run.version, stops.release(run, by))
        leases.release(tx, run.run_id)
        return current(tx.connection, run.run_id)


def pause(store: Store, context: Context, prefix: str, by: str, reason: str = "") -> Run:
    """Request that a running run saves a checkpoint and stops until it is resumed."""
    with store.write() as tx:
        run = current(tx.connection, resolve_id(tx.connection, prefix))
        append_decided(tx, context, run.run_id, run.version, stops.pause(run, by, reason), run.attempt)
        return current(tx.connection, run.run_id)
