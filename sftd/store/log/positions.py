"""Reading positions: of journals by (run, attempt), of projections by name."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.store.database.engine import Tx, insert
from sftd.store.database.tables import journal_cursors, projection_positions


def journal_cursor(connection: sa.Connection, run_id: str, attempt: int) -> tuple[int, int]:
    """(last ingested line, byte offset after it) of an attempt's journal; (0, 0) before the first line."""
    c = journal_cursors.c
    row = connection.execute(
        sa.select(c.line, c.byte_offset).where(c.run_id == run_id, c.attempt == attempt)
    ).first()
    return (row.line, row.byte_offset) if row else (0, 0)


def set_journal_cursor(tx: Tx, run_id: str, attempt: int, line: int, byte_offset: int) -> None:
    """Move an attempt's journal cursor, in the transaction that appends the events up to it."""
    statement = insert(tx.connection, journal_cursors).values(
        run_id=run_id, attempt=attempt, line=line, byte_offset=byte_offset
    )
    tx.execute(
        statement.on_conflict_do_update(
            index_elements=["run_id", "attempt"], set_={"line": line, "byte_offset": byte_offset}
        )
    )


def projection_position(connection: sa.Connection, name: str) -> int:
    """Position of the last event that a projection has processed; 0 before the first event."""
    query = sa.select(projection_positions.c.position).where(projection_positions.c.name == name)
    return connection.execute(query).scalar() or 0


def set_projection_position(connection: sa.Connection, name: str, position: int) -> None:
    """Move a projection's position, in the transaction that writes its view."""
    statement = insert(connection, projection_positions).values(name=name, position=position)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"position": position}))


def begin_projection(connection: sa.Connection, name: str, position: int) -> None:
    """Set the first position of a projection, unless it already has one."""
    statement = insert(connection, projection_positions).values(name=name, position=position)
    connection.execute(statement.on_conflict_do_nothing())


def has_begun(connection: sa.Connection, name: str) -> bool:
    """Whether a projection has a position, including 0."""
    query = sa.select(projection_positions.c.name).where(projection_positions.c.name == name)
    return connection.execute(query).first() is not None
