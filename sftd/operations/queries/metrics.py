"""Counts over all runs, for monitoring. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.queue.order import latest_wait
from sftd.domain.run.state import Status
from sftd.store.database.engine import Store
from sftd.store.database.tables import events, queue, view_runs
from sftd.store.log import event_store, positions
from sftd.store.queue import order
from sftd.store.queue.leases import HELD, LEASED, WAITING


class Lag(msgspec.Struct, frozen=True):
    """`events`: number of log events that a mirror does not have yet, an upper bound because positions have gaps. `micros`: how
    long the first of them has been in the log."""

    events: int
    micros: int


class LogFigures(msgspec.Struct, frozen=True):
    """`queue` counts runs by their state there: "ready", "dependent" (on a run that has not succeeded yet), "delayed" (until the
    time of their next attempt), "held", "leased". `runs` counts runs by status. `mirrors` is by name."""

    queue: dict[str, int]
    oldest_wait_micros: int
    runs: dict[str, int]
    mirrors: dict[str, Lag]


def read(store: Store, now: Micros, mirrors: Mapping[str, str]) -> LogFigures:
    """The figures at `now`, this host's time. `mirrors` has the name of each mirror's position by the mirror's name."""
    with store.read() as connection:
        q = queue.c
        # Times in the queue are by the shared clock of the database, times of events by the recording host's clock.
        shared = store.clock(connection, now)
        is_delayed = sa.and_(q.not_before > shared, q.not_before <= latest_wait(shared))
        is_dependent = order.is_unmet(q.run_id)
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
                # `not_before` is the time from which a waiting run may start.
                sa.func.min(sa.case((is_ready, q.not_before))),
            )
        ).one()
        by_status = sa.select(view_runs.c.status, sa.func.count()).group_by(view_runs.c.status)
        runs: dict[str, int] = dict.fromkeys(get_args(Status), 0)
        runs.update((status, number) for status, number in connection.execute(by_status))
        lags = {name: _lag(connection, position, now) for name, position in mirrors.items()}
    return LogFigures(
        queue=dict(zip(("ready", "delayed", "dependent", "held", "leased"), row[:5], strict=True)),
        oldest_wait_micros=max(0, shared - row[5]) if row[5] is not None else 0,
        runs=runs,
        mirrors=lags,
    )


def _lag(connection: sa.Connection, position_name: str, now: Micros) -> Lag:
    at = positions.projection_position(connection, position_name)
    first = sa.select(events.c.recorded_at).where(events.c.position > at).order_by(events.c.position).limit(1)
    since = connection.execute(first).scalar()
    missing = max(0, event_store.last_position(connection) - at)
    return Lag(missing, max(0, now - since) if since is not None else 0)
