"""Daemons that share this database, alive or not."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.run.identity import Identity
from sftd.store.database.engine import Tx
from sftd.store.database.tables import daemons


class DaemonRow(msgspec.Struct, frozen=True):
    """A daemon. `devices` is JSON: how many it has of each kind, and beside them its limits (`user_limit`, `project_limit`; 0 is
    none); `stopped_at` is set when it stopped by itself. Times are those of the database's clock,
    so that those of several hosts can be compared."""

    daemon_id: str
    host: str
    pid: int
    create_time: float
    home: str
    devices: str
    started_at: Micros
    seen_at: Micros
    stopped_at: Micros | None = None
    boot_id: str = ""
    pid_namespace: str = ""
    home_id: str = ""

    @property
    def identity(self) -> Identity:
        """Where it runs, beyond its host's name."""
        return Identity(self.boot_id, self.pid_namespace, self.home_id)


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


def namesakes(connection: sa.Connection, host: str, home: str, since: Micros) -> list[DaemonRow]:
    """Daemons of this host name and home path that have not stopped and were seen after `since`."""
    c = daemons.c
    query = sa.select(daemons).where(
        c.host == host, c.home == home, c.stopped_at.is_(None), c.seen_at > since
    )
    return [DaemonRow(*row) for row in connection.execute(query.order_by(c.daemon_id))]


def every(connection: sa.Connection) -> list[DaemonRow]:
    """All daemons that ever started on this database, the newest first."""
    query = sa.select(daemons).order_by(daemons.c.started_at.desc(), daemons.c.daemon_id)
    return [DaemonRow(*row) for row in connection.execute(query)]
