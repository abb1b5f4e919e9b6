"""Leases on what only one of the daemons that share a database does at a time, by name: a mirror, a channel of notices.

A lease is free once it has expired by the database's clock.
"""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.store.database.engine import Tx, insert
from sftd.store.database.tables import claims
from sftd.store.queue.lease_table import LeaseTable

_LEASES = LeaseTable(claims.c.name)
check = _LEASES.check


def take(tx: Tx, name: str, token: str, owner: str, now: Micros, micros: int) -> bool:
    """Take a lease that is free or has expired, or prolong one's own, for `micros` from now. False while it is another's."""
    at = tx.now(now)
    free = insert(tx.connection, claims).values(name=name, token="", owner="", expires_at=0)
    tx.execute(free.on_conflict_do_nothing())
    is_free = sa.or_(claims.c.token == token, claims.c.expires_at <= at)
    return _LEASES.take(tx, name, token, owner, at + micros, where=is_free)


def renew(tx: Tx, token: str, now: Micros, micros: int) -> bool:
    """Prolong a lease, for `micros` from now. False when another has taken it since, even if that one has expired, too."""
    return bool(_LEASES.renew(tx, [token], tx.now(now) + micros))


def release(tx: Tx, name: str, token: str) -> None:
    """Give a lease back, if it is still held with this token."""
    tx.execute(sa.delete(claims).where(claims.c.name == name, claims.c.token == token))


def holder(connection: sa.Connection, name: str) -> tuple[str, str] | None:
    """(token, owner) of the daemon that holds a lease, or held it last."""
    row = connection.execute(sa.select(claims.c.token, claims.c.owner).where(claims.c.name == name)).first()
    return (row.token, row.owner) if row else None
