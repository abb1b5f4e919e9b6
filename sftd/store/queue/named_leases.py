"""Leases by name on tasks that only one of the daemons sharing a database may do at a time: a mirror, a notice channel.

A lease is free when it has expired by the database's clock.
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
    """Take a free lease or extend one that `token` holds, for `micros` from now. Returns False while another token holds it."""
    at = tx.now(now)
    free = insert(tx.connection, claims).values(name=name, token="", owner="", expires_at=0)
    tx.execute(free.on_conflict_do_nothing())
    is_free = sa.or_(claims.c.token == token, claims.c.expires_at <= at)
    return _LEASES.take(tx, name, token, owner, at + micros, where=is_free)


def renew(tx: Tx, token: str, now: Micros, micros: int) -> bool:
    """Extend a lease, for `micros` from now. Returns False if another token has taken it, even if that lease has expired."""
    return bool(_LEASES.renew(tx, [token], tx.now(now) + micros))


def release(tx: Tx, name: str, token: str) -> None:
    """Release a lease if `token` still holds it."""
    tx.execute(sa.delete(claims).where(claims.c.name == name, claims.c.token == token))


def holder(connection: sa.Connection, name: str) -> tuple[str, str] | None:
    """(token, owner) of the current or last holder of a lease."""
    row = connection.execute(sa.select(claims.c.token, claims.c.owner).where(claims.c.name == name)).first()
    return (row.token, row.owner) if row else None
