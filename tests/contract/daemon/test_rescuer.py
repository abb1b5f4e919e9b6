"""Which attempts a daemon takes over: those whose daemon and processes are proven to be gone, and no others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import sqlalchemy as sa

from sftd.daemon.registration import NotAlone, Registration, this_daemon
from sftd.daemon.rescuer import Orphans, orphaned
from sftd.domain.run.identity import Identity
from sftd.launcher import processes
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.projections import views
from sftd.settings import Settings, read
from sftd.store.database import tables
from sftd.store.database.engine import Store
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow
from sftd.store.queue.leases import Lease
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile, RunDir
from sftd.wire.preflight import Preflight
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC

HERE = Identity("boot", "namespace", "8:1")
SILENT = 60_000_000
NOW = 1_000_000_000


class Place:
    """A database whose time is this test's, and a home on it."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store = Store(
            store.engine, before_commit=(views.catch_up,), clock=lambda _connection, local: local
        )
        self.home = home
        self.me = self.row("me", HERE)
        self.context = Context(actor="test", now=lambda: NOW)

    def row(self, name: str, identity: Identity, **fields: Any) -> DaemonRow:
        """A daemon of this host name and home path that is not running here, seen just now."""
        me = processes.identify(os.getpid())
        row = DaemonRow(name, "host", me.pid, me.create_time - 1000, str(self.home), "{}", NOW, NOW)
        return msgspec.structs.replace(row, **msgspec.structs.asdict(identity), **fields)

    def driven_by(self, row: DaemonRow) -> tuple[Lease, AttemptDir]:
        """A run whose attempt a daemon has claimed, and the attempt's folder, which is not there yet."""
        with self.store.write(appends=False) as tx:
            daemons.register(tx, row)
        submit_all(self.store, self.context, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")
        found = attempts.claim(
            self.store,
            self.context,
            daemon=row.daemon_id,
            host="host",
            fits=lambda run: True,
            lease_micros=LEASE,
        )
        assert found is not None
        return found.lease, RunDir(self.home, found.lease.run_id).attempt(found.lease.attempt)

    def orphans(self, now: int = NOW, driven: frozenset[str] = frozenset()) -> Orphans:
        return orphaned(self.store, self.me, set(driven), now, SILENT)


@pytest.fixture
def place(store: Store, tmp_path: Path) -> Place:
    return Place(store, tmp_path)


def start(directory: AttemptDir, lease: Lease, launcher: Literal["local", "slurm"] = "local") -> None:
    launch = msgspec.structs.replace(SPEC.launch, launcher=launcher)
    directory.create(
        Order(
            run_id=lease.run_id,
            attempt=1,
            token=lease.token,
            spec=msgspec.structs.replace(SPEC, launch=launch),
            planned_steps=3,
            checkpoint_dir="c",
        )
    )


def test_orphans_are_proven(place: Place) -> None:
    """A dead daemon of this home, or our own lease without a supervisor; never another host's."""
    create_time = processes.identify(os.getpid()).create_time
    rows = {
        "alive": place.row("alive", HERE, create_time=create_time),
        "dead": place.row("dead", HERE),
        "stopped": place.row("stopped", HERE, create_time=create_time, stopped_at=NOW),
        "of an older sftd": place.row("of an older sftd", Identity()),
        "elsewhere": place.row("elsewhere", HERE, host="other"),
        "another home": place.row("another home", HERE, home="/else"),
        "me": place.me,
    }
    leases = {name: place.driven_by(row)[0] for name, row in rows.items()}
    found = place.orphans()
    assert {lease.owner for lease in found.found} == {"dead", "stopped", "of an older sftd", "me"}
    assert found.unobserved == []
    driven = frozenset({leases["me"].token})
    assert "me" not in {lease.owner for lease in place.orphans(driven=driven).found}


# Another container or machine with the same host name and home path: a pid that is not here says nothing of it.
ELSEWHERE = {
    "another container with its own home": Identity("boot", "other namespace", "9:7"),
    "another container with a home of the same inode": Identity("boot", "other namespace", "9:1"),
    "another machine": Identity("other boot", "namespace", "8:7"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("state", ["alive", "silent", "stopped"])
def test_nothing_is_proven_of_what_runs_elsewhere(place: Place, where: str, state: str) -> None:
    stopped = {"stopped_at": NOW} if state == "stopped" else {}
    lease, _ = place.driven_by(place.row("other", ELSEWHERE[where], **stopped))
    found = place.orphans(NOW + (2 * SILENT if state == "silent" else 0))
    assert (found.found, [one for one, _ in found.unobserved]) == ([], [lease])


def test_the_folder_of_another_home_proves_nothing(place: Place) -> None:
    """It has the same path in both containers."""
    lease, directory = place.driven_by(place.row("other", Identity("boot", "other namespace", "9:7")))
    start(directory, msgspec.structs.replace(lease, token="of another run"))
    assert directory.is_held_alive() is None
    os.close(directory.hold_alive() or -1)
    assert place.orphans(NOW + 2 * SILENT).found == []


RESTARTED = Identity("boot", "the namespace before", "8:1")


def test_a_restarted_container_takes_over_what_is_proven_to_have_ended(place: Place) -> None:
    """Its new pid namespace shows nothing of the old one's processes; the lock that torchrun holds does."""
    lease, directory = place.driven_by(place.row("before", RESTARTED))
    assert place.orphans().found == [lease], "the daemon ended before it started anything"
    start(directory, lease)
    assert place.orphans().found == [], "started by an sftd that held no lock"
    alive = directory.hold_alive()
    assert alive is not None
    found = place.orphans(NOW + 2 * SILENT)
    assert (found.found, len(found.unobserved)) == ([], 1), "torchrun lives on in another container"
    os.close(alive)
    assert place.orphans().found == [lease]


def test_a_container_whose_layer_has_another_device_number_waits_for_silence(place: Place) -> None:
    lease, directory = place.driven_by(place.row("before", Identity("boot", "the namespace before", "9:1")))
    start(directory, lease)
    os.close(directory.hold_alive() or -1)
    assert place.orphans().found == []
    assert place.orphans(NOW + 2 * SILENT).found == [lease]


@pytest.mark.parametrize("readable", [True, False], ids=["its order", "its places"])
def test_an_attempt_of_a_resource_manager_is_asked_about_from_anywhere(place: Place, readable: bool) -> None:
    """No lock of this file system shows it, and nothing here needs to."""
    lease, directory = place.driven_by(place.row("before", RESTARTED))
    start(directory, lease, launcher="slurm")
    assert place.orphans().found == [lease]
    directory.write_process(ProcessFile(pid=0, create_time=0.0, host="host", devices=["slurm:3"]))
    if not readable:
        directory.order_file.write_text("{")
    assert place.orphans().found == [lease]


@pytest.mark.parametrize("started", [False, True])
def test_a_reboot_ends_everything(place: Place, started: bool) -> None:
    """Once the daemon is silent: a clone of this machine has the same inodes, and lives."""
    lease, directory = place.driven_by(place.row("before", Identity("the boot before", "namespace", "7:1")))
    if started:
        start(directory, lease)
    assert place.orphans().found == []
    assert place.orphans(NOW + 2 * SILENT).found == [lease]
    if started:
        # The home is shared, and so are its locks: another machine trains there.
        alive = directory.hold_alive()
        assert alive is not None
        assert place.orphans(NOW + 2 * SILENT).found == []
        os.close(alive)


# Starting beside a daemon that has the same host name and home path.


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return read({"SFTD_HOME": str(tmp_path), "SFTD_LEASE_SECONDS": "30"})


@pytest.fixture
def registration(place: Place, settings: Settings) -> Callable[[], Registration]:
    def make() -> Registration:
        row = msgspec.structs.replace(this_daemon(settings, {}), host="host", **msgspec.structs.asdict(HERE))
        return Registration(place.store, place.context, settings, row)

    return make


def renew(place: Place, at: int) -> None:
    with place.store.write(appends=False) as tx:
        tx.execute(sa.update(tables.daemons).values(seen_at=at))


@pytest.mark.parametrize("where", [*ELSEWHERE.values(), Identity("the boot before", "namespace", "8:1")])
def test_a_daemon_does_not_start_beside_its_twin(
    place: Place, registration: Callable[[], Registration], where: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with place.store.write(appends=False) as tx:
        daemons.register(tx, place.row("twin", where))
    mine = registration()
    with caplog.at_level(logging.WARNING):
        assert [mine.is_free(), mine.is_free()] == [False, False]
    (said,) = caplog.messages
    assert "twin" in said
    assert "waiting at most 60 s" in said
    renew(place, NOW + 1)
    with pytest.raises(NotAlone, match="docker run --hostname"):
        mine.is_free()
    renew(place, NOW - SILENT)
    assert registration().is_free(), "silent: it may be gone, and its runs are left alone"


def test_a_daemon_starts_at_once_where_nobody_can_be_beside_it(
    place: Place, registration: Callable[[], Registration]
) -> None:
    """Each of these had, or would have, the lock of the very home whose lock this daemon holds."""
    with place.store.write(appends=False) as tx:
        for name, where in {"killed": HERE, "before the restart": RESTARTED, "older": Identity()}.items():
            daemons.register(tx, place.row(name, where))
        daemons.register(tx, place.row("stopped", ELSEWHERE["another machine"], stopped_at=NOW))
    mine = registration()
    assert mine.is_free()
    mine.register()
    with place.store.read() as connection:
        row = daemons.find(connection, mine.row.daemon_id)
    assert row is not None
    assert row.identity == HERE


def test_this_process_has_an_identity(tmp_path: Path) -> None:
    found = processes.identity(tmp_path)
    assert found.is_known
    assert found.is_same(processes.identity(tmp_path))
    assert not found.is_same(processes.identity(tmp_path.parent))
