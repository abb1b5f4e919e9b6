"""Jobs that only one of the daemons that share a database does. A claim is an expiring right with a token, as a lease is; it
is judged by the same clock."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.store.database.engine import Tx, insert
from sftd.store.database.tables import claims


def hold(tx: Tx, name: str, token: str, owner: str, now: Micros, micros: int) -> bool:
    """Take a claim that is free or has expired, or prolong one's own, for `micros` from now. False while it is another's."""
    at = tx.now(now)
    values = {"token": token, "owner": owner, "expires_at": at + micros}
    statement = insert(tx.connection, claims).values(name=name, **values)
    statement = statement.on_conflict_do_update(
        index_elements=["name"],
        set_=values,
        where=sa.or_(claims.c.token == token, claims.c.expires_at <= at),
    )
    return tx.execute(statement.returning(claims.c.name)).first() is not None


def release(tx: Tx, name: str, token: str) -> None:
    """Give a claim back, if it is still held with this token."""
    tx.execute(sa.delete(claims).where(claims.c.name == name, claims.c.token == token))


def holder(connection: sa.Connection, name: str) -> tuple[str, str] | None:
    """(token, owner) of who holds a claim, or held it last."""
    row = connection.execute(sa.select(claims.c.token, claims.c.owner).where(claims.c.name == name)).first()
    return (row.token, row.owner) if row else None
