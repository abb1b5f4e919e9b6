"""A whole database into another one, row for row, and the proof that both are equal."""

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
# (what is done, rows done, rows in all)
Progress = Callable[[str, int, int], None]
_encode = msgspec.msgpack.Encoder().encode


class CopyDiffers(SftdError):
    """What was written does not read back as it was."""


class TableDigest(msgspec.Struct, frozen=True):
    """How many rows a table has, and the sha256 over all of them in the order of their keys."""

    rows: int
    sha256: str


def first_filled(connection: sa.Connection) -> str | None:
    """Name of a table that has a row; None when the database is empty."""
    for table in metadata.sorted_tables:
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            return str(table.name)
    return None


def copy(source: sa.Connection, target: Tx, progress: Progress) -> dict[str, TableDigest]:
    """Copy every table into the empty one of `target`, positions and all, and read it back there. Returns the digests,
    which are those of both. Raises `CopyDiffers`, upon which the target's transaction takes everything back."""
    read: dict[str, TableDigest] = {}
    for table in metadata.sorted_tables:
        names = [column.name for column in table.columns]
        tally = _Tally(f"copying {table.name}", _count(source, table), progress)
        for batch in batched(tally.watch(_rows(source, table)), _BATCH):
            insert_rows(target.connection, table, names, batch)
        read[str(table.name)] = tally.digest()
    _go_on_behind(target, target.connection.execute(sa.select(sa.func.max(events.c.position))).scalar())
    written = digests(target.connection, progress)
    if wrong := [name for name in read if read[name] != written[name]]:
        raise CopyDiffers(
            f"{', '.join(wrong)}: the copy does not read back as it was written; nothing was copied"
        )
    return written


def digests(connection: sa.Connection, progress: Progress) -> dict[str, TableDigest]:
    """The digest of every table: databases with equal digests hold the same, byte for byte."""
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
    # In the order of the bytes, which is not every server's order of texts.
    keys = [c.collate("C") if _sorts_by_language(connection, c) else c for c in table.primary_key.columns]
    query = sa.select(table).order_by(*keys).execution_options(yield_per=_BATCH)
    return (tuple(row) for row in connection.execute(query))


def _sorts_by_language(connection: sa.Connection, column: sa.Column[object]) -> bool:
    return connection.dialect.name == "postgresql" and isinstance(column.type, sa.String)


def _go_on_behind(target: Tx, last: int | None) -> None:
    # SQLite sees by itself that positions were given.
    if last is not None and target.connection.dialect.name == "postgresql":
        target.execute(
            sa.text("SELECT setval(pg_get_serial_sequence('events', 'position'), :last)"), {"last": last}
        )
