"""A lease is the right to do something until a time. A token identifies it. Every write under a lease checks the token, so that
a process that has lost its lease writes nothing. All tables with leases share this mechanism."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.errors import LeaseLost
from sftd.domain.log.events import Micros
from sftd.store.database.engine import Tx


class LeaseTable:
    """The leases in one table, whose rows have a `token`, an `owner` and `expires_at`."""

    def __init__(self, key: sa.Column[str], is_leased: sa.ColumnElement[bool] | None = None) -> None:
        """`key` is the column that identifies the leased object. A row is a lease if `is_leased` is true."""
        self._key = key
        self._columns = key.table.c
        self.is_leased = sa.true() if is_leased is None else is_leased

    def take(
        self,
        tx: Tx,
        key: str,
        token: str,
        owner: str,
        expires_at: Micros,
        *,
        where: sa.ColumnElement[bool],
        **more: object,
    ) -> bool:
        """Lease `key` if `where` is true for its row, and set the values `more`. Returns False if `where` is false."""
        statement = (
            sa.update(self._key.table)
            .where(self._key == key, where)
            .values(token=token, owner=owner, expires_at=expires_at, **more)
            .returning(self._key)
        )
        return tx.execute(statement).first() is not None

    def renew(self, tx: Tx, tokens: list[str], expires_at: Micros) -> set[str]:
        """Extend leases. Returns the tokens that still hold one."""
        if not tokens:
            return set()
        held = self._columns.token
        statement = sa.update(self._key.table).where(self.is_leased, held.in_(tokens))
        return set(tx.execute(statement.values(expires_at=expires_at).returning(held)).scalars())

    def check(self, tx: Tx, key: str, token: str) -> None:
        """Raises `LeaseLost` unless `token` holds the lease. Locks the row until the end of the transaction."""
        query = sa.select(self._key).where(self._key == key, self.is_leased, self._columns.token == token)
        if tx.execute(query.with_for_update()).first() is None:
            raise LeaseLost(f"This daemon lost the lease on {key}: another daemon took it over.")
