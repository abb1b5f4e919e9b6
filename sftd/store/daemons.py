"""Daemons that share this database, alive or not."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.events import Micros
from sftd.store.engine import Tx, insert
from sftd.store.tables import daemons


class DaemonRow(msgspec.Struct, frozen=True):
    """A daemon. `devices` is JSON; `stopped_at` is set when it stopped by itself."""

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
    tx.execute(insert(tx.connection, daemons).values(**msgspec.structs.asdict(row)))


def seen(tx: Tx, daemon_id: str, now: Micros) -> None:
    """A daemon is alive."""
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(seen_at=now))


def stopped(tx: Tx, daemon_id: str, now: Micros) -> None:
    """A daemon stops by itself."""
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(stopped_at=now, seen_at=now))


def find(connection: sa.Connection, daemon_id: str) -> DaemonRow | None:
    """One daemon, or None."""
    row = connection.execute(sa.select(daemons).where(daemons.c.daemon_id == daemon_id)).first()
    return DaemonRow(*row) if row else None
