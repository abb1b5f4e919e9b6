"""Daemons that share this database, alive or not."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.events import Micros
from sftd.store.engine import Tx
from sftd.store.tables import daemons


class DaemonRow(msgspec.Struct, frozen=True):
    """A daemon. `devices` is JSON: how many it has of each kind, and beside them its limits (`user_limit`, `project_limit`; 0 is
    none); `stopped_at` is set when it stopped by itself. Times are those of the database's clock,
    so that daemons on several hosts can be told apart by them."""

    daemon_id: str
    host: str
    pid: int
    create_time: float
    home: str
    devices: str
    started_at: Micros
    seen_at: Micros
    stopped_at: Micros | None = None


def register(tx: Tx, row: DaemonRow) -> None:
    """Write a daemon's row; its id is new at each start."""
    values = msgspec.structs.asdict(row) | {
        "started_at": tx.now(row.started_at),
        "seen_at": tx.now(row.seen_at),
    }
    tx.execute(sa.insert(daemons).values(**values))


def seen(tx: Tx, daemon_id: str, now: Micros) -> None:
    """A daemon is alive."""
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(seen_at=tx.now(now)))


def stopped(tx: Tx, daemon_id: str, now: Micros) -> None:
    """A daemon stops by itself."""
    now = tx.now(now)
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(stopped_at=now, seen_at=now))


def find(connection: sa.Connection, daemon_id: str) -> DaemonRow | None:
    """One daemon, or None."""
    row = connection.execute(sa.select(daemons).where(daemons.c.daemon_id == daemon_id)).first()
    return DaemonRow(*row) if row else None


def every(connection: sa.Connection) -> list[DaemonRow]:
    """All daemons that ever started on this database, the newest first."""
    query = sa.select(daemons).order_by(daemons.c.started_at.desc(), daemons.c.daemon_id)
    return [DaemonRow(*row) for row in connection.execute(query)]
