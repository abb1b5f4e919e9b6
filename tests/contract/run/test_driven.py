"""What a daemon hands to an attempt, and what it records of it: every field of the order, and how the attempt ended. The
attempts are no processes."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd.daemon.loop import Daemon
from sftd.domain.log import events as e
from sftd.domain.model.files import ModelFile, ModelFiles
from sftd.domain.queue.demand import Need
from sftd.domain.run.decisions import Proposal
from sftd.domain.run.failures import Interruption, RankError, Remains
from sftd.domain.spec.sections import Launch, Scheduler, Training
from sftd.domain.spec.spec import OrderStart
from sftd.launcher.inventory import Inventory
from sftd.launcher.seam import Report
from sftd.operations.commands import lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.queries.runs import find_run
from sftd.projections import views
from sftd.settings import read
from sftd.store.database.engine import Store, open_engine
from sftd.store.log import event_store
from sftd.store.queue import daemons, leases
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile, RunDir
from sftd.wire.attempt.journal import JournalWriter
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, SHAPE, SPEC
from tests.builders.patience import until

# By one of these every attempt ends.
ENDS = ("AttemptFailed", "AttemptLost", "AttemptPaused", "AttemptPreempted", "RunSucceeded", "RunCancelled")
FILES = ModelFiles(files={"config.json": ModelFile(3, "c")}, weights={"model.safetensors": ModelFile(5, "w")})
FOUND = Preflight(SHAPE, FACTS, msgspec.structs.replace(FACTS, digest="v"), 3, [], FILES)


class Attempt:
    """Lives until `ends` is set, and leaves that."""

    stacks_seconds = 0.0

    def __init__(self, directory: AttemptDir, order: Order, devices: list[str]) -> None:
        self.directory, self.order = directory, order
        self.process: ProcessFile | None = ProcessFile(
            pid=4711, create_time=12.5, host="its-host", devices=devices
        )
        self.journal = JournalWriter(directory.journal)
        self.ends: Remains | None = None
        self.says: Report | None = None
        self.asked_for_stacks = self.is_killed = False

    def end(self, remains: Remains, *last_words: e.Event) -> None:
        for event in last_words:
            self.journal.append(event)
        self.journal.close()
        self.ends = remains

    def is_alive(self) -> bool:
        return self.ends is None

    def kill(self) -> list[int]:
        self.is_killed = True
        if self.ends is None:
            self.end(Remains(None))
        return []

    def report(self) -> Report | None:
        return self.says

    def ask_for_stacks(self) -> None:
        self.asked_for_stacks = True

    def stacks(self) -> list[str]:
        return ["rank 0: wait (a.py:1)", "rank 1: gives no stack"]

    def remains(self) -> Remains:
        return self.ends or Remains(None)


class Host:
    """A daemon in a thread, and the attempts that it starts."""

    def __init__(self, store: Store, home: Path, started: list[Attempt], **environ: str) -> None:
        self.store, self.home, self.started = store, home, started
        self.refuses: OSError | None = None
        given = {"SFTD_HOME": str(home), "MLFLOW_TRACKING_URI": "", "SFTD_POLL_SECONDS": "0.01"}
        given |= {"SFTD_BACKOFF_SECONDS": "0.001"} | environ
        self.daemon = Daemon(store, read(given), Inventory(2, 4), launcher=self)
        self.thread = threading.Thread(target=self.daemon.run)
        self.thread.start()

    def stop(self) -> None:
        self.daemon.stop()
        self.thread.join()

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Any, list[str]]:
        if self.refuses is not None:
            error, self.refuses = self.refuses, None
            raise error
        directory.create(order)
        self.started.append(Attempt(directory, order, devices))
        return self.started[-1], ["torchrun", "--its-options"]

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Any:
        return next(attempt for attempt in self.started if attempt.directory.path == directory.path)

    def submit(self, training: Training | None = None, **launch: Any) -> str:
        # With a constant learning rate a person may make the run longer.
        spec = msgspec.structs.replace(
            SPEC,
            launch=Launch(**launch),
            training=training or SPEC.training,
            scheduler=Scheduler(type="constant"),
        )
        return submit_all(self.store, CONTEXT, [Wish(spec, FOUND)], "ada")[0]

    def attempt(self, number: int) -> Attempt:
        """The attempt that was started as this one of all, once its launch is recorded."""
        until(lambda: len(self.started) >= number)
        attempt = self.started[number - 1]
        until(lambda: self.events(attempt.order.run_id, "AttemptLaunched", attempt.order.attempt))
        return attempt

    def until_an_attempt_has_ended(self, run_id: str) -> None:
        """However it did: a test says what it must have been."""

        def ended() -> bool:
            with self.store.read() as connection:
                return any(event_store.read_types(connection, [run_id], ENDS))

        until(ended)

    def events(self, run_id: str, name: str, attempt: int | None = None) -> list[e.Event]:
        with self.store.read() as connection:
            found = event_store.read_stream(connection, run_id, types=(name,))
            return [r.event for r in found if attempt in (None, r.attempt)]

    def until_step(self, run_id: str, step: int) -> None:
        until(lambda: find_run(self.store, run_id).step == step)

    def until_it_is(self, run_id: str, status: str) -> None:
        until(lambda: find_run(self.store, run_id).status == status)


@pytest.fixture
def make(sqlite_template: Path, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    shutil.copyfile(sqlite_template, tmp_path / "sftd.db")
    engine = open_engine(f"sqlite:///{tmp_path}/sftd.db")
    (tmp_path / "home").mkdir()
    made: list[Host] = []
    started: list[Attempt] = []

    def host(**environ: str) -> Host:
        store = Store(engine, before_commit=(views.catch_up,))
        made.append(Host(store, tmp_path / "home", started, **environ))
        return made[-1]

    yield host
    for one in made:
        one.stop()
    for attempt in started:
        attempt.kill()
    engine.dispose()


def test_an_order_says_what_the_log_says(make: Callable[..., Host]) -> None:
    """Of the first attempt, of one that resumes, and of one that a person makes longer."""
    host = make()
    run_id = host.submit(Training(on_non_finite="rollback"), max_restarts=5)
    first = host.attempt(1)
    home = RunDir(host.home, run_id)
    expected = Order(
        run_id=run_id,
        attempt=1,
        token=first.directory.lease() or "",
        spec=find_run(host.store, run_id).spec,
        planned_steps=3,
        checkpoint_dir=str(home.checkpoint_dir("")),
        checkpoint=None,
        checkpoint_digest=None,
        train_digest="d",
        val_digest="v",
        model_files=FILES,
        weights={},
        model_root=str(host.home),
        order_start=OrderStart(0, 0),
        losses=[],
    )
    assert first.directory.order() == first.order == expected
    assert first.directory.path == home.attempt(1).path

    folder = home.checkpoint_dir("") / "step-00000001"
    published = e.CheckpointPublished(step=1, path=str(folder), bytes=1, manifest_digest="m1", seconds=1.0)
    weights = e.WeightsDigested(files={"model.safetensors": "w"}, bytes=1, seconds=1.0)
    words = (weights, step(1, loss=3.5), published, step(2, loss=2.5))
    (folder / "x").mkdir(parents=True)
    first.end(Remains(1, [RankError(0, "NonFiniteLoss: it is nan")]), *words)
    second = host.attempt(2)
    batch = expected.spec.data.train_batch_size
    assert second.order.token not in ("", first.order.token)
    expected = msgspec.structs.replace(
        expected,
        attempt=2,
        token=second.order.token,
        checkpoint=str(folder),
        checkpoint_digest="m1",
        weights={"model.safetensors": "w"},
        order_start=OrderStart(1, 2 * batch),
        # No step after the checkpoint counts.
        losses=[3.5],
    )
    assert second.directory.order() == expected

    lifecycle.cancel(host.store, CONTEXT, run_id, "ada")
    until(second.directory.stop_requested)
    second.end(Remains(0))
    host.until_it_is(run_id, "cancelled")
    longer = msgspec.structs.replace(
        expected.spec, trainer=msgspec.structs.replace(expected.spec.trainer, max_steps=7)
    )
    lifecycle.resume(host.store, CONTEXT, run_id, "ada", None, Proposal(longer, 7, "d", "v"))
    third = host.attempt(3)
    expected = msgspec.structs.replace(
        expected, attempt=3, token=third.order.token, spec=longer, planned_steps=7
    )
    assert third.directory.order() == expected


def test_a_launch_is_recorded_with_all_that_identifies_it(make: Callable[..., Host]) -> None:
    host = make()
    run_id = host.submit(nproc_per_node=2, device="cuda")
    attempt = host.attempt(1)
    assert host.events(run_id, "AttemptLaunched") == [
        e.AttemptLaunched(
            pid=4711,
            create_time=12.5,
            host="its-host",
            directory=str(attempt.directory.path),
            argv=["torchrun", "--its-options"],
            devices=["cuda:0", "cuda:1"],
        )
    ]
    (claimed,) = host.events(run_id, "AttemptClaimed")
    assert isinstance(claimed, e.AttemptClaimed)
    assert claimed.daemon == host.daemon.daemon_id


def test_a_restarted_daemon_reads_the_journal_from_where_it_was(make: Callable[..., Host]) -> None:
    """Twice, so that its place was written down and moved: no line is lost, and none is there twice."""
    host = make()
    run_id = host.submit()
    attempt = host.attempt(1)
    for first in (1, 4, 7):
        for number in range(first, first + 2):
            attempt.journal.append(step(number))
            host.until_step(run_id, number)
        host.stop()
        # What comes while nobody looks.
        attempt.journal.append(step(first + 2))
        host = make()
        host.until_step(run_id, first + 2)
    steps = [
        found.step for found in host.events(run_id, "StepCompleted") if isinstance(found, e.StepCompleted)
    ]
    assert steps == list(range(1, 10))
    assert len(host.events(run_id, "AttemptAdopted")) == 3
    assert len(host.events(run_id, "AttemptLaunched")) == 1


def test_a_living_daemon_renews_its_lease_and_its_row(make: Callable[..., Host]) -> None:
    """Without that others take its attempts for abandoned ones."""
    host = make(SFTD_LEASE_SECONDS="0.3")
    run_id = host.submit()
    host.attempt(1)

    def lease_and_row() -> tuple[int, int]:
        with host.store.read() as connection:
            (row,) = daemons.every(connection)
            return leases.expires_at(connection, run_id) or 0, row.seen_at

    ends, _ = lease_and_row()
    for _ in range(2):
        _, seen = lease_and_row()
        until(lambda seen=seen: lease_and_row()[1] > seen)
    assert lease_and_row()[0] > ends


@pytest.mark.parametrize(
    ("remains", "ended"),
    [
        # Nobody knows how it ended.
        (Remains(None), e.AttemptLost(message="the attempt's processes are gone and left no exit code")),
        (
            Remains(None, last_word="slurm: NODE_FAIL: job 7 on n1, exit code 0:0", last_cause="lost"),
            e.AttemptLost(message="slurm: NODE_FAIL: job 7 on n1, exit code 0:0"),
        ),
        (
            Remains(1, last_word="slurm: NODE_FAIL: job 7 on n1, exit code 0:0", last_cause="lost"),
            e.AttemptLost(message="slurm: NODE_FAIL: job 7 on n1, exit code 0:0"),
        ),
        # A rank said what its torchrun could not.
        (
            Remains(None, [RankError(1, "ValueError: odd", ["  File x", "ValueError: odd"])]),
            e.AttemptFailed(
                cause="crash",
                message="rank 1: ValueError: odd",
                exit_code=None,
                evidence=["rank 1: ValueError: odd", "  File x", "ValueError: odd"],
            ),
        ),
        (
            Remains(137, output_tail=["a", "b", "c", "d"]),
            e.AttemptFailed(
                cause="killed",
                message="torchrun was killed by signal 9",
                exit_code=137,
                evidence=["b", "c", "d"],
            ),
        ),
    ],
)
def test_how_an_attempt_ended_is_what_it_left(
    make: Callable[..., Host], remains: Remains, ended: e.AttemptFailed | e.AttemptLost
) -> None:
    host = make(SFTD_BACKOFF_SECONDS="100")
    run_id = host.submit()
    host.attempt(1).end(remains)
    host.until_an_attempt_has_ended(run_id)
    (found,) = host.events(run_id, type(ended).__name__)
    assert isinstance(found, e.AttemptFailed | e.AttemptLost)
    assert found.retry_at is not None
    assert msgspec.structs.replace(found, retry_at=None) == ended


def test_an_attempt_that_hangs_is_killed_and_its_stacks_are_recorded(make: Callable[..., Host]) -> None:
    """It is not taken for a lost one, although nobody knows its exit code."""
    host = make(SFTD_BACKOFF_SECONDS="100")
    run_id = host.submit(hang_seconds=1, hang_factor=1.0)
    attempt = host.attempt(1)
    # The start may take longer.
    attempt.journal.append(step(1))
    host.until_an_attempt_has_ended(run_id)
    assert (attempt.asked_for_stacks, attempt.is_killed) == (True, True)
    (failed,) = host.events(run_id, "AttemptFailed")
    assert isinstance(failed, e.AttemptFailed)
    assert (failed.cause, failed.exit_code) == ("hang", None)
    assert failed.evidence == ["rank 0: wait (a.py:1)", "rank 1: gives no stack"]


def test_what_the_resource_manager_says_is_recorded_when_it_changes(make: Callable[..., Host]) -> None:
    host = make()
    run_id = host.submit()
    attempt = host.attempt(1)
    waits, runs_now = Report("7", "PENDING", "Priority", waits=True), Report("7", "RUNNING", nodes="n1")
    expected = [
        e.JobReported(job="7", state="PENDING", reason="Priority"),
        e.JobReported(job="7", state="RUNNING", nodes="n1"),
    ]
    for number, said in enumerate((waits, runs_now), 1):
        attempt.says = said
        until(lambda number=number: len(host.events(run_id, "JobReported")) == number)
        # What it says once more while a step is taken in is not recorded once more.
        attempt.journal.append(step(number))
        host.until_step(run_id, number)
        assert host.events(run_id, "JobReported") == expected[:number]
    attempt.end(msgspec.structs.replace(Remains(0), interruption=Interruption("preempted", "by others")))
    host.until_an_attempt_has_ended(run_id)
    assert host.events(run_id, "AttemptPreempted") == [
        e.AttemptPreempted(step=0, by_run="", reason="by others")
    ]


@pytest.mark.parametrize(
    ("number", "cause"), [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (errno.EACCES, "crash")]
)
def test_a_full_disk_at_the_start_is_recorded_as_one(
    make: Callable[..., Host], number: int, cause: str
) -> None:
    host = make(SFTD_BACKOFF_SECONDS="100")
    host.refuses = OSError(number, "it takes nothing")
    run_id = host.submit()
    host.until_an_attempt_has_ended(run_id)
    (failed,) = host.events(run_id, "AttemptFailed")
    assert isinstance(failed, e.AttemptFailed)
    assert (failed.cause, failed.exit_code) == (cause, None)
    assert failed.message == f"torchrun could not be started: [Errno {number}] it takes nothing"
