"""Counts over all runs, for graphs and alarms. Nothing here writes."""

from __future__ import annotations

from typing import get_args

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.queue.order import latest_wait
from sftd.domain.run.state import Status
from sftd.store.database.engine import Store
from sftd.store.database.tables import events, queue, view_runs
from sftd.store.log import event_store, positions
from sftd.store.queue import order as schedule
from sftd.store.queue.leases import HELD, LEASED, WAITING


class Figures(msgspec.Struct, frozen=True):
    """`queue` counts runs by what they wait for: "ready", "dependent" (on a run that has not succeeded yet), "delayed" (until the
    time of their next attempt), "held", "leased".
    `runs` counts them by status. What the mirror lacks is 0 where there is none."""

    queue: dict[str, int]
    oldest_wait_micros: int
    runs: dict[str, int]
    mirror_lag_events: int
    mirror_lag_micros: int


def read(store: Store, now: Micros, mirror: str | None) -> Figures:
    """The figures at `now`, this host's time. `mirror` names the position of the MLflow mirror."""
    with store.read() as connection:
        q = queue.c
        # The queue goes by the clock that all share, events by that of the host which recorded them.
        shared = store.clock(connection, now)
        is_delayed = sa.and_(q.not_before > shared, q.not_before <= latest_wait(shared))
        is_dependent = schedule.is_unmet(q.run_id)
        is_ready = sa.and_(q.state == WAITING, ~is_delayed, ~is_dependent)

        def count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
            return sa.func.count(sa.case((condition, 1)))

        row = connection.execute(
            sa.select(
                count(is_ready),
                count(sa.and_(q.state == WAITING, is_delayed, ~is_dependent)),
                count(sa.and_(q.state == WAITING, is_dependent)),
                count(q.state == HELD),
                count(q.state == LEASED),
                # It is set when a run begins to wait, and to when it may start.
                sa.func.min(sa.case((is_ready, q.not_before))),
            )
        ).one()
        by_status = sa.select(view_runs.c.status, sa.func.count()).group_by(view_runs.c.status)
        runs: dict[str, int] = dict.fromkeys(get_args(Status), 0)
        runs.update((status, number) for status, number in connection.execute(by_status))
        lag, since = _mirror_lag(connection, mirror)
    return Figures(
        queue=dict(zip(("ready", "delayed", "dependent", "held", "leased"), row[:5], strict=True)),
        oldest_wait_micros=max(0, shared - row[5]) if row[5] is not None else 0,
        runs=runs,
        mirror_lag_events=lag,
        mirror_lag_micros=max(0, now - since) if since is not None else 0,
    )


def _mirror_lag(connection: sa.Connection, mirror: str | None) -> tuple[int, Micros | None]:
    """How many events the mirror lacks, and since when the first of them is in the log. Positions have gaps, so the
    number is an upper bound."""
    if mirror is None:
        return 0, None
    at = positions.projection_position(connection, mirror)
    first = sa.select(events.c.recorded_at).where(events.c.position > at).order_by(events.c.position).limit(1)
    since = connection.execute(first).scalar()
    return max(0, event_store.last_position(connection) - at), since
