"""One of several daemons mirrors; another takes over when it is gone. On SQLite and PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import pytest

from sftd.daemon import mirror_turn
from sftd.daemon.mirror_turn import MirrorTurn
from sftd.launcher.processes import host_name
from sftd.operations.context import Context
from sftd.store.database.engine import Store
from sftd.store.queue import daemons, named_leases
from sftd.store.queue.daemons import DaemonRow
from tests.builders.patience import never

SECONDS = 60.0
ME = psutil.Process()


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds

    def micros(self) -> int:
        return int(self.seconds * 1_000_000)


class Counting:
    """Counts what it is asked to do. `during` is called while it mirrors."""

    def __init__(self) -> None:
        self.synced = self.forgotten = 0
        self.during: Callable[[], None] = lambda: None
        self.was_stopped = False

    def sync(self, should_stop: Callable[[], bool]) -> int:
        self.synced += 1
        self.during()
        self.was_stopped = should_stop()
        return 5

    def forget(self) -> None:
        self.forgotten += 1


class Daemons:
    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = Store(store.engine, clock=lambda _connection, local: local)
        self.clock = clock

    def start(
        self, name: str, *, host: str, pid: int = 0, create_time: float = 0.0
    ) -> tuple[MirrorTurn, Counting]:
        with self.store.write(appends=False) as tx:
            daemons.register(tx, DaemonRow(name, host, pid, create_time, "/home", "[]", 1, 1))
        mirror, context = Counting(), Context(actor=name, now=self.clock.micros)
        return MirrorTurn("MLflow", lambda: mirror, self.store, context, "mlflow:x", name, SECONDS), mirror


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mirror_turn.time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture
def hosts(store: Store, clock: Clock) -> Daemons:
    return Daemons(store, clock)


def test_one_mirrors_and_the_other_waits_until_its_lease_has_expired(hosts: Daemons, clock: Clock) -> None:
    (first, one), (second, two) = hosts.start("first", host="a"), hosts.start("second", host="b")
    assert (first.sync(never), second.sync(never)) == (5, 0)
    # The first mirrors for longer than a lease lasts: it is prolonged.
    for _ in range(4):
        clock.seconds += SECONDS / 2
        assert (first.sync(never), second.sync(never)) == (5, 0)
    assert (one.forgotten, one.was_stopped, two.synced) == (0, False, 0)
    # Now the first hangs, or its host is gone, which cannot be seen from here.
    clock.seconds += SECONDS + 1
    assert second.sync(never) == 5
    # It comes back, and finds that it is no longer its turn, in the middle of its work as well.
    assert first.sync(never) == 0
    clock.seconds += SECONDS + 1
    assert first.sync(never) == 5
    assert one.forgotten == 1

    def other_takes_over() -> None:
        clock.seconds += SECONDS + 1
        assert second.sync(never) == 5

    one.during = other_takes_over
    first.sync(never)
    assert one.was_stopped


def test_one_that_stops_gives_its_turn_away(hosts: Daemons, clock: Clock) -> None:
    (first, _), (second, _) = hosts.start("first", host="a"), hosts.start("second", host="b")
    assert (first.sync(never), second.sync(never)) == (5, 0)
    second.close()
    first.close()
    clock.seconds += SECONDS / 2
    assert (second.sync(never), first.sync(never)) == (5, 0)


def test_one_of_this_host_that_was_killed_is_not_waited_for(hosts: Daemons) -> None:
    here = host_name()
    (killed, _) = hosts.start("killed", host=here, pid=2**22 + 1, create_time=1.0)
    alive, _ = hosts.start("alive", host=here, pid=os.getpid(), create_time=ME.create_time())
    later, _ = hosts.start("later", host=here, pid=os.getpid(), create_time=ME.create_time())
    assert killed.sync(never) == 5
    assert alive.sync(never) == 5, "its process is gone: that is proof"
    assert later.sync(never) == 0, "that one lives"
    with hosts.store.read() as connection:
        held = named_leases.holder(connection, "mlflow:x")
    assert held is not None
    assert held[1] == "alive"
