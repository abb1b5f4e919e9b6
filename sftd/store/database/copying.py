"""Copy a whole database into another one, row by row, and prove that both are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import batched

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import SftdError
from sftd.store.database.engine import Tx, insert_rows
from sftd.store.database.tables import events, metadata

_BATCH = 5000
# (activity, rows done, total rows)
Progress = Callable[[str, int, int], None]
_encode = msgspec.msgpack.Encoder().encode


class CopyDiffers(SftdError):
    """The rows read back from the copy differ from the source."""


class TableDigest(msgspec.Struct, frozen=True):
    """The number of rows of a table, and the sha256 over all rows in key order."""

    rows: int
    sha256: str


def first_filled(connection: sa.Connection) -> str | None:
    """Name of the first table that has a row; None when the database is empty."""
    for table in metadata.sorted_tables:
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            return str(table.name)
    return None


def copy(source: sa.Connection, target: Tx, progress: Progress) -> dict[str, TableDigest]:
    """Copy every table, positions included, into the empty database `target`, and read it back there.

    Returns the digests, which are the same for both. Raises `CopyDiffers`; the transaction of `target` then rolls back.
    """
    read: dict[str, TableDigest] = {}
    for table in metadata.sorted_tables:
        names = [column.name for column in table.columns]
        tally = _Tally(f"copying {table.name}", _count(source, table), progress)
        for batch in batched(tally.watch(_rows(source, table)), _BATCH):
            insert_rows(target.connection, table, names, batch)
        read[str(table.name)] = tally.digest()
    _advance_sequence(target)
    written = digests(target.connection, progress)
    if wrong := [name for name in read if read[name] != written[name]]:
        raise CopyDiffers(
            f"{', '.join(wrong)}: the copy differs from the source when read back; nothing was copied"
        )
    return written


def digests(connection: sa.Connection, progress: Progress) -> dict[str, TableDigest]:
    """Table name → digest. Databases with equal digests hold the same rows, byte for byte."""
    found = {}
    for table in metadata.sorted_tables:
        tally = _Tally(f"verifying {table.name}", _count(connection, table), progress)
        for _ in tally.watch(_rows(connection, table)):
            pass
        found[str(table.name)] = tally.digest()
    return found


class _Tally:
    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._rows = 0
        self._sha256 = hashlib.sha256()

    def watch(self, rows: Iterator[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
        for row in rows:
            if self._rows % _BATCH == 0:
                self._progress(self._what, self._rows, self._total)
            self._rows += 1
            self._sha256.update(_encode(row))
            yield row

    def digest(self) -> TableDigest:
        return TableDigest(self._rows, self._sha256.hexdigest())


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def _rows(connection: sa.Connection, table: sa.Table) -> Iterator[tuple[object, ...]]:
    # Byte order: the default text order depends on the server's locale.
    keys = [c.collate("C") if _sorts_by_language(connection, c) else c for c in table.primary_key.columns]
    query = sa.select(table).order_by(*keys).execution_options(yield_per=_BATCH)
    return (tuple(row) for row in connection.execute(query))


def _sorts_by_language(connection: sa.Connection, column: sa.Column[object]) -> bool:
    return connection.dialect.name == "postgresql" and isinstance(column.type, sa.String)


def _advance_sequence(target: Tx) -> None:
    """Make PostgreSQL continue after the copied positions. SQLite does so by itself."""
    if target.connection.dialect.name != "postgresql":
        return
    last = target.execute(sa.select(sa.func.max(events.c.position))).scalar()
    if last is not None:
        target.execute(
            sa.text("SELECT setval(pg_get_serial_sequence('events', 'position'), :last)"), {"last": last}
        )
