"""The rows of daemons."""

from __future__ import annotations

from sftd.store.database.engine import Store
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow


def row(daemon_id: str, started_at: int) -> DaemonRow:
    return DaemonRow(daemon_id, "host", 42, 1760000000.123456, "/home", "[]", started_at, started_at)


def test_daemons_come_and_go(store: Store) -> None:
    # The time of this test, and not the server's.
    store = Store(store.engine, clock=lambda _connection, local: local)
    with store.write(appends=False) as tx:
        daemons.register(tx, row("first", 10))
        daemons.register(tx, row("second", 20))
        daemons.seen(tx, "first", 15)
        daemons.stopped(tx, "second", 25)
    with store.read() as connection:
        first, second = daemons.find(connection, "first"), daemons.find(connection, "second")
        assert daemons.find(connection, "none") is None
    assert first is not None
    assert second is not None
    assert (first.daemon_id, first.seen_at, first.stopped_at) == ("first", 15, None)
    assert (second.daemon_id, second.seen_at, second.stopped_at) == ("second", 25, 25)
    assert first.create_time == 1760000000.123456
