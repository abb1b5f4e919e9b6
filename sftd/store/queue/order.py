"""The scheduler's queries: waiting runs in order with their dependencies, and leased runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import Demand
from sftd.domain.queue.order import Entry, latest_wait
from sftd.domain.spec.spec import Spec
from sftd.store.database.engine import Tx, insert
from sftd.store.database.tables import queue, queue_after, queue_demands, view_runs
from sftd.store.log.runs import load_run
from sftd.store.queue.leases import HELD, LEASED, WAITING

# The scheduler usually reads only the first few entries, but sometimes thousands.
_FIRST_PAGE, _LARGEST_PAGE = 10, 1000
_decoder = msgspec.json.Decoder(Demand)


def set_demand(tx: Tx, run_id: str, spec: Spec) -> None:
    """Store the resources that a run needs. Replaces an earlier demand."""
    demand = msgspec.json.encode(Demand.of(spec)).decode()
    statement = insert(tx.connection, queue_demands).values(run_id=run_id, demand=demand)
    tx.execute(statement.on_conflict_do_update(index_elements=["run_id"], set_={"demand": demand}))


def set_after(tx: Tx, run_id: str, after: list[str]) -> None:
    """Make a new run wait until the runs `after` have succeeded."""
    if after:
        tx.execute(sa.insert(queue_after), [{"run_id": run_id, "after": other} for other in after])


def dependents(connection: sa.Connection, run_id: str) -> list[str]:
    """Runs that have not started and wait for this one."""
    query = sa.select(queue_after.c.run_id).join(queue, queue.c.run_id == queue_after.c.run_id)
    query = query.where(queue_after.c.after == run_id, queue.c.state.in_((WAITING, HELD)))
    return list(connection.execute(query.order_by(queue_after.c.run_id)).scalars())


def is_unmet(run_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """The condition that a run which this one waits for has not succeeded."""
    others = sa.select(sa.literal(1)).select_from(queue_after)
    others = others.outerjoin(view_runs, view_runs.c.run_id == queue_after.c.after)
    return others.where(
        queue_after.c.run_id == run_id, sa.func.coalesce(view_runs.c.status, "") != "succeeded"
    ).exists()


_VIEWED = ("status", "user", "project", "step", "planned_steps", "seconds_per_step", "started_at")


def _read(
    connection: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None, with_after: bool
) -> list[Entry]:
    c = queue.c
    # A subquery selects the rows of the queue first, so that the joins look up only those, by key.
    chosen = (
        sa.select(c.run_id, c.state, c.priority, c.enqueued_at, c.not_before, c.owner)
        .where(*where)
        .order_by(c.priority.desc(), c.enqueued_at, c.run_id)
        .limit(limit)
        .subquery()
    )
    query: sa.Select[Any] = (
        sa.select(*chosen.c, queue_demands.c.demand, *(view_runs.c[name] for name in _VIEWED))
        .outerjoin(queue_demands, queue_demands.c.run_id == chosen.c.run_id)
        .outerjoin(view_runs, view_runs.c.run_id == chosen.c.run_id)
        .order_by(chosen.c.priority.desc(), chosen.c.enqueued_at, chosen.c.run_id)
    )
    rows = connection.execute(query).all()
    after = _unmet(connection, [row.run_id for row in rows]) if with_after and rows else {}
    return [_entry(connection, row, after.get(row.run_id, {})) for row in rows]


def _entry(connection: sa.Connection, row: sa.Row[Any], after: dict[str, str]) -> Entry:
    # An older sftd queued the run without a demand.
    demand = _decoder.decode(row.demand) if row.demand else Demand.of(load_run(connection, row.run_id).spec)
    return Entry(
        run_id=row.run_id,
        priority=row.priority,
        demand=demand,
        status=row.status or row.state,
        user=row.user or "",
        project=row.project or "",
        is_held=row.state == HELD,
        enqueued_at=row.enqueued_at,
        not_before=row.not_before,
        started_at=row.started_at,
        owner=row.owner,
        step=row.step or 0,
        planned_steps=row.planned_steps or 0,
        seconds_per_step=row.seconds_per_step,
        after=after,
    )


def _unmet(connection: sa.Connection, run_ids: list[str]) -> dict[str, dict[str, str]]:
    """Run → the runs that it waits for and that have not succeeded → their status."""
    query = (
        sa.select(queue_after.c.run_id, queue_after.c.after, view_runs.c.status)
        .outerjoin(view_runs, view_runs.c.run_id == queue_after.c.after)
        .where(sa.func.coalesce(view_runs.c.status, "") != "succeeded")
        .order_by(queue_after.c.run_id, queue_after.c.after)
    )
    if len(run_ids) <= _LARGEST_PAGE:
        query = query.where(queue_after.c.run_id.in_(run_ids))
    else:
        query = query.join(queue, queue.c.run_id == queue_after.c.run_id)
        query = query.where(queue.c.state.in_((WAITING, HELD)))
    found: dict[str, dict[str, str]] = {}
    for row in connection.execute(query):
        found.setdefault(row.run_id, {})[row.after] = row.status or "unknown"
    return found


def in_order(connection: sa.Connection, now: Micros) -> Iterator[Entry]:
    """Waiting runs that may start now, in start order, read in pages."""
    c = queue.c
    limit = _FIRST_PAGE
    due = (c.state == WAITING, sa.or_(c.not_before <= now, c.not_before > latest_wait(now)))
    page = _read(connection, *due, limit=limit, with_after=True)
    while page:
        yield from page
        if len(page) < limit:
            return
        last, limit = page[-1], min(_LARGEST_PAGE, 10 * limit)
        after_last = sa.or_(
            c.priority < last.priority,
            sa.and_(
                c.priority == last.priority,
                sa.tuple_(c.enqueued_at, c.run_id) > sa.tuple_(last.enqueued_at, last.run_id),
            ),
        )
        page = _read(connection, *due, after_last, limit=limit, with_after=True)


def waiting(connection: sa.Connection) -> list[Entry]:
    """Every waiting or held run, in start order."""
    return _read(connection, queue.c.state.in_((WAITING, HELD)), with_after=True)


def running(connection: sa.Connection, owner: str | None = None) -> list[Entry]:
    """Every run that `owner` drives, or that any daemon drives if `owner` is None."""
    mine = () if owner is None else (queue.c.owner == owner,)
    return _read(connection, queue.c.state == LEASED, *mine, with_after=False)


def stopping(connection: sa.Connection, owner: str) -> list[str]:
    """Runs that a daemon drives and that have a pending stop request. Called in every loop; usually empty."""
    query = sa.select(queue.c.run_id).join(view_runs, view_runs.c.run_id == queue.c.run_id)
    query = query.where(queue.c.state == LEASED, queue.c.owner == owner, view_runs.c.status == "stopping")
    return list(connection.execute(query).scalars())
