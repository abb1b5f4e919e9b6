"""The daemon's loop where folders are broken and leases change hands, with attempts that are no processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from sftd.daemon.loop import Daemon
from sftd.domain.log import events as e
from sftd.domain.model.files import ModelFile, ModelFiles
from sftd.domain.queue.order import Limits
from sftd.domain.run.failures import Failure, Remains
from sftd.domain.spec.sections import Launch, Trainer
from sftd.launcher import processes
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.launcher.inventory import Inventory
from sftd.operations.commands import lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.operations.queries import nodes
from sftd.operations.queries import queue as queue_queries
from sftd.operations.queries.runs import find_run
from sftd.settings import read
from sftd.store.database import backups
from sftd.store.database.engine import Store
from sftd.store.database.file import DatabaseExchanged
from sftd.store.log import event_store
from sftd.store.queue import daemons, leases
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.directory import AttemptDir, Order, RunDir
from sftd.wire.attempt.journal import JournalWriter, Line
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC
from tests.builders.process.idle_launcher import Launcher

# One of the host's two devices.
ONE_DEVICE = msgspec.structs.replace(SPEC, launch=Launch(threads_per_rank=1))


@pytest.fixture
def daemon(log: Store, tmp_path: Path) -> Callable[..., Daemon]:
    environ = {"SFTD_HOME": str(tmp_path), "SFTD_CPU_SLOTS": "2", "MLFLOW_TRACKING_URI": ""}

    def make(launcher: Launcher, **more: str) -> Daemon:
        settings = read(environ | more)
        made = Daemon(log, settings, Inventory(0, 2), launcher=launcher)
        made._register()
        return made

    return make


def submit(log: Store) -> str:
    return submit_all(log, CONTEXT, [Wish(ONE_DEVICE, Preflight(SHAPE, FACTS, None, 3, []))], "ada")[0]


def give_up(log: Store, run_id: str) -> None:
    """As a person does once the lease has ended."""
    with log.read() as connection:
        token = next(lease.token for lease in leases.leases(connection) if lease.run_id == run_id)
    with log.write(appends=False) as tx:
        leases.renew(tx, [token], 1)
    lifecycle.abandon(log, CONTEXT, run_id, "ada")


def unreadable(directory: AttemptDir) -> None:
    """Make a file of the attempt one that can be neither read nor replaced, by any user."""
    directory.lease_file.unlink()
    (directory.lease_file / "x").mkdir(parents=True)


def test_a_lost_attempt_whose_folder_cannot_be_read_is_killed_and_the_daemon_lives(
    log: Store, daemon: Callable[[Launcher], Daemon]
) -> None:
    launcher = Launcher()
    one = daemon(launcher)
    run_id = submit(log)
    one.tick()
    (attempt,) = launcher.started
    unreadable(attempt.directory)
    give_up(log, run_id)
    one._renew_at = 0.0
    one.tick()
    assert attempt.is_killed
    assert one._driven.supervisors == {}


def test_the_queue_goes_by_the_limits_of_the_daemons_and_not_by_those_of_this_shell(
    log: Store, daemon: Callable[..., Daemon]
) -> None:
    one = daemon(Launcher(), SFTD_LIMIT_USER="1")
    first, second = submit(log), submit(log)
    one.tick()
    rows = {row.run_id: row for row in queue_queries.list_queue(log, CONTEXT, Limits(), LEASE)}
    assert (rows[first].status, rows[second].kind) == ("starting", "limit")
    (node,) = nodes.list_nodes(log, CONTEXT, LEASE)
    assert sorted(node.devices) == ["cpus", "gpus"]
    # Another one starts it.
    daemon(Launcher())
    rows = {row.run_id: row for row in queue_queries.list_queue(log, CONTEXT, Limits(user=1), LEASE)}
    assert rows[second].kind == "start"


def test_an_attempt_is_adopted_although_its_folder_takes_no_file(
    log: Store, daemon: Callable[[Launcher], Daemon]
) -> None:
    """A full disk, for one: it must be watched, its end recorded, and its devices not given to another run."""
    launcher = Launcher()
    first = daemon(launcher)
    run_id = submit(log)
    first.tick()
    first._unregister()
    unreadable(launcher.started[0].directory)
    second = daemon(launcher)
    for _ in range(2):
        second._renew_at = 0.0
        second.tick()
    assert list(second._driven.supervisors) == [run_id]
    with log.read() as connection:
        adopted = event_store.read_types(connection, [run_id], ("AttemptAdopted",))
    assert len(adopted) == 1


def test_an_attempt_that_a_person_gave_up_is_killed_before_the_next_one_starts(
    log: Store, daemon: Callable[[Launcher], Daemon]
) -> None:
    """Although its daemon has not noticed yet that it has lost it."""
    launcher = Launcher()
    one = daemon(launcher)
    run_id = submit(log)
    one.tick()
    # Its launch is recorded, and nothing more is to be written of it for now.
    one.tick()
    give_up(log, run_id)
    lifecycle.resume(log, CONTEXT, run_id, "ada")
    one._renew_at = float("inf")
    one.tick()
    old, new = launcher.started
    assert (old.is_killed, new.is_killed) == (True, False)
    assert new.process is not None
    assert sorted(one._inventory.free("cpu") + new.process.devices) == ["cpu:0", "cpu:1"]


def test_a_run_whose_checkpoint_is_on_another_host_is_left_to_that_host(
    log: Store, daemon: Callable[[Launcher], Daemon], tmp_path: Path
) -> None:
    """Started here it would find its checkpoint damaged, and start again."""
    run_id = submit(log)
    folder = tmp_path / "home-of-another-host" / "runs" / run_id / "checkpoints" / "step-00000001"
    with log.write(appends=False) as tx:
        home = str(folder.parents[3])
        daemons.register(tx, DaemonRow("d", "another-host", 1, 1.0, home, '{"gpus":0,"cpus":2}', 1, 1, 2))
    claimed = attempts.claim(
        log, CONTEXT, daemon="d", host="another-host", fits=lambda entry: True, lease_micros=LEASE
    )
    assert claimed is not None
    published = e.CheckpointPublished(step=1, path=str(folder), bytes=1, manifest_digest="m", seconds=1.0)
    told = [Line(number=n, occurred_at=n, event=event) for n, event in enumerate((step(1), published), 1)]
    attempts.record(log, CONTEXT, claimed.lease, told, 20, {})
    attempts.finish(
        log,
        CONTEXT,
        claimed.lease,
        exit_code=1,
        failure=Failure("killed", "m"),
        lost=False,
        backoff_seconds=1e-6,
    )
    launcher = Launcher()
    one = daemon(launcher)
    one.tick()
    assert launcher.started == []
    assert one._starter.nothing_left(), "a daemon that drains does not wait for another host"
    (row,) = queue_queries.list_queue(log, CONTEXT, one._starter._limits, LEASE)
    assert (row.kind, row.waits_for) == ("checkpoint", "a daemon on another-host, which has its checkpoint")
    # Where the folder is shared, any host continues.
    folder.mkdir(parents=True)
    one._starter._starts_here.clear()
    one.tick()
    assert [attempt.directory.order().checkpoint for attempt in launcher.started] == [str(folder)]


@pytest.fixture
def stray() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process of the attempt with a token, as torchrun would be."""
    started: list[subprocess.Popen[bytes]] = []

    def start(token: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, TOKEN_VARIABLE: token}
        started.append(subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_what_lives_on_of_an_attempt_that_was_given_up_is_ended_before_the_next_one(
    log: Store, daemon: Callable[[Launcher], Daemon], stray: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Its daemon was dead when a person gave it up, so nobody noticed that torchrun still trains."""
    launcher = Launcher()
    first = daemon(launcher)
    run_id = submit(log)
    first.tick()
    first._unregister()
    token = launcher.started[0].directory.order().token
    assert [stray(token).pid] == processes.survivors(token)
    give_up(log, run_id)
    lifecycle.resume(log, CONTEXT, run_id, "ada")
    daemon(launcher).tick()
    assert (len(launcher.started), processes.survivors(token)) == (2, [])


def test_an_attempt_never_begins_with_what_another_of_its_number_left(
    log: Store, daemon: Callable[[Launcher], Daemon], stray: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """After a backup of the database was restored: the log knows less than the folders hold."""
    launcher = Launcher()
    run_id = submit(log)
    one = daemon(launcher)
    directory = RunDir(one._settings.home, run_id).attempt(1)
    order = Order(
        run_id=run_id, attempt=1, token="of another history", spec=SPEC, planned_steps=3, checkpoint_dir="c"
    )
    directory.create(order)
    with contextlib.closing(JournalWriter(directory.journal)) as writer:
        writer.append(step(1))
    directory.request_stop()
    assert [stray(order.token).pid] == processes.survivors(order.token)
    one.tick()
    one.tick()
    assert (find_run(log, run_id).step, directory.stop_requested()) == (0, False)
    assert processes.survivors(order.token) == []
    (aside,) = directory.path.parent.glob("attempt-0001.*")
    assert AttemptDir(aside).order() == order
    assert AttemptDir(aside).journal.stat().st_size > 0


def test_a_disk_that_was_full_when_the_attempt_ended_is_told_once_there_is_room(
    log: Store, daemon: Callable[[Launcher], Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database lies on it, too, and takes nothing before that."""
    launcher = Launcher()
    one = daemon(launcher)
    run_id = submit(log)
    one.tick()
    one.tick()
    (attempt,) = launcher.started
    attempt.is_killed = True
    attempt.left = [Remains(1, last_word="No space left on device: 0 bytes"), Remains(1)]
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise sa.exc.OperationalError("INSERT", None, Exception("database or disk is full"))

        patched.setattr(attempts, "steps_before", full)
        patched.setattr(one._driven.supervisors[run_id], "_before", None)
        with pytest.raises(sa.exc.OperationalError):
            one.tick()
    one._driven._look_at.clear()
    one.tick()
    with log.read() as connection:
        (failed,) = event_store.read_types(connection, [run_id], ("AttemptFailed",))
    assert isinstance(failed.event, e.AttemptFailed)
    assert (failed.event.cause, failed.event.exit_code) == ("disk full", 1)


def test_a_daemon_stops_when_its_database_file_is_exchanged(
    log: Store, daemon: Callable[[Launcher], Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that it wrote from then on would be lost with the old file."""
    if log.engine.dialect.name != "sqlite":
        pytest.skip("a server's database has no file")
    launcher = Launcher()
    one = daemon(launcher)
    submit(log)
    one.tick()
    monkeypatch.setattr(one, "_register", lambda: None)
    file = Path(log.engine.url.database or "")
    backups.write(file, tmp_path / "backup.db")
    os.replace(tmp_path / "backup.db", file)
    with pytest.raises(DatabaseExchanged):
        one.run()
    assert not launcher.started[0].is_killed, "training continues"
    log.engine.dispose()
    backups.check_integrity(file)
    with log.read() as connection:
        rows = daemons.every(connection)
    assert [row.stopped_at for row in rows] == [None]
    file.unlink()
    with pytest.raises(DatabaseExchanged, match="removed"):
        one.run()


def recorded_steps(log: Store, run_id: str) -> list[int]:
    with log.read() as connection:
        found = event_store.read_stream(connection, run_id, types=("StepCompleted",))
        return [r.event.step for r in found if isinstance(r.event, e.StepCompleted)]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick looks at every attempt, however slow the machine is."""
    monkeypatch.setattr("sftd.daemon.driven._LOOK_SECONDS", 3600.0)


def running(log: Store, one: Daemon, launcher: Launcher) -> tuple[list[str], list[JournalWriter]]:
    """Two runs whose launch is recorded, and their journals."""
    ids = [submit(log), submit(log)]
    for _ in range(2):
        one._driven._look_at.clear()
        one.tick()
    assert all(supervisor.is_recorded for supervisor in one._driven.supervisors.values())
    order = {attempt.directory.path.parent.name: attempt for attempt in launcher.started}
    return ids, [JournalWriter(order[run_id].directory.journal) for run_id in ids]


@pytest.mark.usefixtures("unhurried")
def test_the_journals_of_several_runs_are_taken_in_by_one_transaction(
    log: Store, daemon: Callable[[Launcher], Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher()
    one = daemon(launcher)
    ids, journals = running(log, one, launcher)
    batches: list[int] = []
    record_all = attempts.record_all

    def count(store: Store, context: Context, batch: list[attempts.Taken]) -> Any:
        batches.append(sum(len(taken.lines) for taken in batch))
        return record_all(store, context, batch)

    monkeypatch.setattr(attempts, "record_all", count)
    for number, writer in enumerate(journals, 1):
        for n in range(1, number + 1):
            writer.append(step(n))
    for _ in range(2):
        one._driven._look_at.clear()
        one.tick()
    assert batches == [3, 0]
    assert [recorded_steps(log, run_id) for run_id in ids] == [[1], [1, 2]]
    for writer in journals:
        writer.close()


@pytest.mark.usefixtures("unhurried")
def test_a_lost_lease_and_a_broken_journal_keep_no_others_lines_back(
    log: Store, daemon: Callable[[Launcher], Daemon]
) -> None:
    launcher = Launcher()
    one = daemon(launcher)
    (lost, whole), (first, second) = running(log, one, launcher)
    for writer in (first, second):
        writer.append(step(1))
    give_up(log, lost)
    one._driven._look_at.clear()
    one.tick()
    assert (recorded_steps(log, lost), recorded_steps(log, whole)) == ([], [1])
    assert list(one._driven.supervisors) == [whole]
    second.close()
    (journal,) = (a.directory.journal for a in launcher.started if a.directory.path.parent.name == whole)
    with open(journal, "a") as file:
        file.write("no event\n")
    one._driven._look_at.clear()
    one.tick()
    with log.read() as connection:
        (said,) = event_store.read_types(connection, [whole], ("AnomalyDetected",))
    assert "cannot be read" in str(said.event)
    first.close()


def test_an_attempt_gets_everything_that_the_log_knows(
    log: Store, daemon: Callable[[Launcher], Daemon], tmp_path: Path
) -> None:
    """Every field of its order. What it finds otherwise, such as another checkpoint in the place of the recorded one, it
    refuses; so what the order leaves out is not checked."""
    files = ModelFiles(files={"config.json": ModelFile(2, "c")}, weights={"w": ModelFile(3, "w")})
    facts = msgspec.structs.replace(FACTS, digest="t"), msgspec.structs.replace(FACTS, digest="v")
    spec = msgspec.structs.replace(ONE_DEVICE, trainer=Trainer(max_steps=30))
    run_id = submit_all(log, CONTEXT, [Wish(spec, Preflight(SHAPE, *facts, 30, [], files))], "ada")[0]
    launcher = Launcher()
    one = daemon(launcher)
    one.tick()
    (first,) = launcher.started
    lease = next(iter(one._driven.supervisors.values())).lease
    run_dir = RunDir(one._settings.home, run_id)
    folder = run_dir.path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    published = e.CheckpointPublished(
        step=2, path=str(folder), bytes=1, manifest_digest="of-this-one", seconds=1.0
    )
    told: list[e.Event] = [
        e.WeightsDigested(files={"w": "x"}, bytes=3, seconds=1.0),
        step(1, loss=3.0),
        step(2, loss=2.0),
        published,
        step(3, loss=9.0),
    ]
    lines = [Line(number=n, occurred_at=n, event=event) for n, event in enumerate(told, 1)]
    attempts.record(log, CONTEXT, lease, lines, 20, {})
    first.is_killed = True
    one._driven._look_at.clear()
    one.tick()
    with log.write(appends=False) as tx:
        leases.wait_again(tx, run_id, 0)
    one._driven._look_at.clear()
    one.tick()
    assert len(launcher.started) == 2
    order = launcher.started[1].directory.order()
    assert order.token != first.directory.order().token
    assert order == Order(
        run_id=run_id,
        attempt=2,
        token=order.token,
        spec=spec,
        planned_steps=30,
        checkpoint_dir=str(run_dir.path / "checkpoints"),
        checkpoint=str(folder),
        checkpoint_digest="of-this-one",
        train_digest="t",
        val_digest="v",
        model_files=files,
        weights={"w": "x"},
        model_root=str(tmp_path),
        losses=[3.0, 2.0],
    )
