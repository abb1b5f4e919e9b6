"""Queue one run, or all points of a sweep at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.run import ids
from sftd.domain.run.state import ENDED
from sftd.domain.spec.spec import Spec
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store, Tx
from sftd.store.log.runs import is_taken
from sftd.store.queries.resolve import resolve_ids
from sftd.store.queue import leases, order
from sftd.wire import preflight
from sftd.wire.preflight import Preflight

# There are 2^32 ids. With 10,000 runs, one sweep of 1,000 in 400 draws a taken id.
_DRAWS = 10


class Wish(msgspec.Struct, frozen=True):
    """A run to be queued. `values` are the settings of its point in the sweep."""

    spec: Spec
    found: Preflight
    warnings: Sequence[Problem] = ()
    values: dict[str, Any] = {}


def submit_all(
    store: Store,
    context: Context,
    wishes: Sequence[Wish],
    user: str,
    *,
    after: Sequence[str] = (),
    sweep: str = "",
) -> list[str]:
    """Record runs and queue them, all or none. They start once the runs `after` have succeeded. Returns their ids."""
    with store.write() as tx:
        others = _to_wait_for(tx.connection, after)
        now = tx.now(context.now())
        run_ids = []
        for number, wish in enumerate(wishes):
            run_id = new_run_id(tx, context)
            first: list[e.Event] = [preflight.submission(wish.spec, wish.found, list(wish.warnings), user)]
            if sweep:
                first.append(e.SweepJoined(sweep=sweep, values=wish.values))
            if others:
                first.append(e.RunDeferred(after=others))
            append_decided(tx, context, run_id, 0, first)
            # The points of a sweep start in the order in which they were written.
            leases.enqueue(tx, run_id, wish.spec.launch.priority, now + number)
            order.set_demand(tx, run_id, wish.spec)
            order.set_after(tx, run_id, others)
            run_ids.append(run_id)
    return run_ids


def new_run_id(tx: Tx, context: Context) -> str:
    """An id that no run has."""
    drawn = (ids.run_id(context.random(4)) for _ in range(_DRAWS))
    return next(
        (run_id for run_id in drawn if not is_taken(tx.connection, run_id)), ids.run_id(context.random(4))
    )


def check_after(store: Store, prefixes: Sequence[str]) -> None:
    """Raise `Refused` if `submit_all` would refuse these prefixes. Queues nothing."""
    if prefixes:
        with store.read() as connection:
            _to_wait_for(connection, prefixes)


def _to_wait_for(connection: sa.Connection, prefixes: Sequence[str]) -> list[str]:
    """Ids of the runs to wait for. Raises `Refused` for one that ended without success: only a user can resume it."""
    found: list[str] = []
    for run_id in [run_id for text in prefixes for run_id in resolve_ids(connection, text)]:
        run = current(connection, run_id)
        if run.status in ENDED and run.status != "succeeded":
            what = f"{run.run_id} {run.how_it_ended}"
            raise Refused(Problem("--after", what, f"resume it first: `sftd resume {run.run_id}`"))
        if run.run_id not in found:
            found.append(run.run_id)
    return found
