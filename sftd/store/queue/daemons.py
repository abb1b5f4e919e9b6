"""The daemons that share this database, running or not."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.run.identity import Identity
from sftd.store.database.engine import Tx
from sftd.store.database.tables import daemons


class DaemonRow(msgspec.Struct, frozen=True):
    """A daemon. `devices` is JSON: the number of devices of each kind, and the limits `user_limit` and `project_limit` (0: no
    limit). `stopped_at` is set on a clean shutdown. Times are from the database's clock, so that they compare across hosts."""

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
        """Where the daemon runs; more exact than the host name."""
        return Identity(self.boot_id, self.pid_namespace, self.home_id)


def register(tx: Tx, row: DaemonRow) -> None:
    """Insert a daemon's row. A daemon has a new id at each start."""
    values = msgspec.structs.asdict(row) | {
        "started_at": tx.now(row.started_at),
        "seen_at": tx.now(row.seen_at),
    }
    tx.execute(sa.insert(daemons).values(**values))


def seen(tx: Tx, daemon_id: str, now: Micros) -> None:
    """Record that a daemon is running."""
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(seen_at=tx.now(now)))


def stopped(tx: Tx, daemon_id: str, now: Micros) -> None:
    """Record that a daemon shuts down."""
    now = tx.now(now)
    tx.execute(sa.update(daemons).where(daemons.c.daemon_id == daemon_id).values(stopped_at=now, seen_at=now))


def find(connection: sa.Connection, daemon_id: str) -> DaemonRow | None:
    """One daemon, or None."""
    row = connection.execute(sa.select(daemons).where(daemons.c.daemon_id == daemon_id)).first()
    return DaemonRow(*row) if row else None


def namesakes(connection: sa.Connection, host: str, home: str, since: Micros) -> list[DaemonRow]:
    """Daemons with this host name and home path that have not shut down and were seen after `since`."""
    c = daemons.c
    query = sa.select(daemons).where(
        c.host == host, c.home == home, c.stopped_at.is_(None), c.seen_at > since
    )
    return [DaemonRow(*row) for row in connection.execute(query.order_by(c.daemon_id))]


def every(connection: sa.Connection) -> list[DaemonRow]:
    """All daemons that ever started on this database, newest first."""
    query = sa.select(daemons).order_by(daemons.c.started_at.desc(), daemons.c.daemon_id)
    return [DaemonRow(*row) for row in connection.execute(query)]
