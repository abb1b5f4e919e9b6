"""Feeds one tracker from the log, from the position up to which it has been fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import sqlalchemy as sa

from sftd.projections.mirrors.seam import Interrupted, Writer
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log.event_store import read_stream
from sftd.store.log.positions import projection_position, set_projection_position

# Rows of the log that are looked at before the position moves.
_WINDOW = 5000
# Events of a run that are read and decoded at once.
_PAGE = 1000


class _Window(NamedTuple):
    """The next rows of the log: how many, up to which position, and the last version of each run among them."""

    rows: int
    position: int
    versions: dict[str, int]


class Feed:
    """Not for several threads.

    The position only says where to look for new events. How far each run is, its tracker says (`Writer.cursor`): without
    the position, the feed reads everything once and writes nothing.
    """

    def __init__(self, store: Store, writer: Writer, position_name: str) -> None:
        self._store = store
        self._writer = writer
        self._position_name = position_name
        self._position: int | None = None

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy what is new in the log; returns the number of its events that the tracker now has.

        Stops early, between two requests, when `should_stop` says so. Raises `MirrorUnavailable`; the next call continues
        exactly there.
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
        """Another daemon has written meanwhile: ask the tracker again how far each run is."""
        self._writer.forget()

    def copy_run(self, run_id: str, version: int, should_stop: Callable[[], bool]) -> bool:
        """Copy a run at least up to `version`, wherever the position is. False if it was stopped before."""

        def go_on() -> None:
            # Asking also keeps the turn, which expires (`daemon/mirror_turn.py`).
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
            # What was sent may have arrived or not: only the tracker knows.
            self._writer.forget()
            if isinstance(error, Interrupted):
                return False
            raise
        return True

    def _put_back(self) -> None:
        """Have another daemon ask the tracker again from where this one was, if that has written meanwhile: a request of
        this one that was held up (its host slept, say) came after the other's, with an older cursor and status."""
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
            # Another daemon mirrors too: its cursors are ahead of those remembered. Sending twice does no harm, but a
            # tracker may take seconds to find a batch that it has already in a long history.
            self._writer.forget()
            self._position = position
        return _Window(
            len(rows), rows[-1].position if rows else position, {row.run_id: row.version for row in rows}
        )
