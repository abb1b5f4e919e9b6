"""How far was read: journals by (run, attempt), projections by name."""

from __future__ import annotations

import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.store.database.engine import Tx, insert
from sftd.store.database.tables import journal_cursors, projection_positions


def journal_cursor(connection: sa.Connection, run_id: str, attempt: int) -> tuple[int, int]:
    """(last ingested line, byte offset behind it) of an attempt's journal; (0, 0) before the first."""
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
    """Position of the last event that a projection has taken in; 0 before the first."""
    query = sa.select(projection_positions.c.position).where(projection_positions.c.name == name)
    return connection.execute(query).scalar() or 0


def set_projection_position(connection: sa.Connection, name: str, position: int) -> None:
    """Move a projection's position, in the transaction that writes its view."""
    statement = insert(connection, projection_positions).values(name=name, position=position)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"position": position}))


def begin_projection(connection: sa.Connection, name: str, position: int) -> None:
    """Have a projection begin behind `position`, unless it has begun already."""
    statement = insert(connection, projection_positions).values(name=name, position=position)
    connection.execute(statement.on_conflict_do_nothing())


def has_begun(connection: sa.Connection, name: str) -> bool:
    """Whether a projection has a position, be it 0."""
    query = sa.select(projection_positions.c.name).where(projection_positions.c.name == name)
    return connection.execute(query).first() is not None


# The right to move a projection's position is a row beside it, whose position is the time at which the right ends,
# negated: so it is never taken for a place in the log. A right is known by that time, for each one ends later than
# the one before it.
def _lease_name(name: str) -> str:
    return f"{name}:lease"


def lease_projection(tx: Tx, name: str, held: Micros | None, now: Micros, until: Micros) -> Micros | None:
    """Take the right to move a projection's position, or prolong the one that ends at `held`. Returns when it ends; None
    when somebody else has it."""
    c = projection_positions.c
    begin_projection(tx.connection, _lease_name(name), 0)
    query = sa.select(c.position).where(c.name == _lease_name(name)).with_for_update()
    found = -tx.execute(query).scalar_one()
    if found > now if held is None else found != held:
        return None
    until = max(until, found + 1)
    set_projection_position(tx.connection, _lease_name(name), -until)
    return until


def holds_projection(tx: Tx, name: str, held: Micros) -> bool:
    """Whether the right that ends at `held` is the one that counts, to the end of the transaction."""
    c = projection_positions.c
    query = sa.select(c.position).where(c.name == _lease_name(name)).with_for_update()
    return bool(-tx.execute(query).scalar_one() == held)


def release_projection(tx: Tx, name: str, held: Micros) -> None:
    """Give a right back, if it is still held."""
    c = projection_positions.c
    tx.execute(
        sa.update(projection_positions)
        .where(c.name == _lease_name(name), c.position == -held)
        .values(position=0)
    )
