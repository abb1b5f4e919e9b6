"""Feed one tracker from the log, starting at its position."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import sqlalchemy as sa

from sftd.projections.mirrors.seam import Interrupted, Writer
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log.event_store import read_stream
from sftd.store.log.positions import projection_position, set_projection_position

# Rows of the log that are copied before the position moves.
_WINDOW = 5000
# Events of a run that are read and decoded at once.
_PAGE = 1000


class _Window(NamedTuple):
    """The next rows of the log: their number, the last position, and the last version of each run among them."""

    rows: int
    position: int
    versions: dict[str, int]


class Feed:
    """Copies new events to a tracker. Not thread-safe.

    The position only speeds up the search for new events. The tracker stores how far each run is copied (`Writer.cursor`):
    if the position is lost, the feed reads the log once more and writes nothing.
    """

    def __init__(self, store: Store, writer: Writer, position_name: str) -> None:
        self._store = store
        self._writer = writer
        self._position_name = position_name
        self._position: int | None = None

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy new events of the log. Returns the number of events copied.

        Stops early, between two requests, when `should_stop()` is true. Raises `MirrorUnavailable`; the next call continues
        at the same event.
        """
        taken = 0
        while not should_stop():
            window = self._next_window()
            if not window.rows:
                break
            for run_id, version in window.versions.items():
                if not self.copy_run(run_id, version, should_stop):
                    self._put_back()
                    return taken
            with self._store.write(appends=False) as tx:
                set_projection_position(tx.connection, self._position_name, window.position)
            self._position = window.position
            taken += window.rows
        return taken

    def forget(self) -> None:
        """Drop the remembered cursors, because another daemon has written in the meantime."""
        self._writer.forget()

    def copy_run(self, run_id: str, version: int, should_stop: Callable[[], bool]) -> bool:
        """Copy a run at least up to `version`, regardless of the position. Returns False if it was stopped earlier."""

        def go_on() -> None:
            # The call also renews the turn, which expires (`daemon/mirror_turn.py`).
            if should_stop():
                raise Interrupted

        try:
            cursor = self._writer.cursor(run_id, version)
            while cursor < version:
                go_on()
                with self._store.read() as connection:
                    page = list(read_stream(connection, run_id, cursor, self._writer.types, _PAGE))
                last = page[-1].version if page else version
                cursor = last if len(page) == _PAGE else max(last, version)
                self._writer.send(run_id, page, cursor, go_on)
        except BaseException as error:
            # The last request may or may not have arrived: read the cursors from the tracker again.
            self._writer.forget()
            if isinstance(error, Interrupted):
                return False
            raise
        return True

    def _put_back(self) -> None:
        """Move the position back if another daemon has moved it, so that it checks the same runs again. A delayed request of this
        daemon (its host was suspended, for example) may have overwritten a newer cursor and status."""
        with self._store.write(appends=False) as tx:
            if self._position not in (None, projection_position(tx.connection, self._position_name)):
                set_projection_position(tx.connection, self._position_name, self._position or 0)

    def _next_window(self) -> _Window:
        with self._store.read() as connection:
            position = projection_position(connection, self._position_name)
            query = (
                sa.select(events.c.position, events.c.run_id, events.c.version)
                .where(events.c.position > position)
                .order_by(events.c.position)
                .limit(_WINDOW)
            )
            rows = connection.execute(query).all()
        if position != self._position:
            # Another daemon has mirrored since, so the remembered cursors are outdated. Sending events twice is harmless, but
            # a tracker may take seconds to detect a duplicate batch in a long history.
            self._writer.forget()
            self._position = position
        return _Window(
            len(rows), rows[-1].position if rows else position, {row.run_id: row.version for row in rows}
        )
