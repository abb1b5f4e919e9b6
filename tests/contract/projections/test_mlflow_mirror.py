"""The MLflow mirror against real MLflow: what is in MLflow equals what is in the log, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from sftd.cli import app, main
from sftd.cli.operate import ui
from sftd.daemon import mirror_turn
from sftd.daemon.mirror_turn import MirrorTurn
from sftd.domain.log import events as e
from sftd.domain.spec.spec import Spec
from sftd.operations.context import Context
from sftd.projections.mirrors import feed as feeds
from sftd.projections.mirrors.feed import Feed
from sftd.projections.mirrors.mlflow import client as mlflow_client
from sftd.projections.mirrors.mlflow import reading
from sftd.projections.mirrors.mlflow import writer as mlflow_writer
from sftd.projections.mirrors.mlflow.check import MirrorComparison, compare_run, rebuild
from sftd.projections.mirrors.mlflow.writer import MlflowWriter, position_name
from sftd.projections.mirrors.seam import MirrorUnavailable
from sftd.settings import read as read_settings
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.schema import metadata
from sftd.store.database.tables import events, projection_positions
from sftd.store.log import event_store
from sftd.store.log.positions import projection_position
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow
from tests.builders import json_fields
from tests.builders.paths import ROOT
from tests.builders.patience import never

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)

START = 1_700_000_000_000_000
History = dict[str, list[tuple[int, int, str]]]


class Killed(BaseException):
    """The process ends here."""


class Log:
    """Writes runs into the log, a second between events."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = START
        self.versions: dict[str, int] = {}

    def add(self, run_id: str, *new: e.Event, attempt: int | None = None) -> None:
        items = []
        for event in new:
            self.now += 1_000_001
            items.append(
                e.NewEvent(
                    event=event,
                    event_id=str(uuid.uuid4()),
                    occurred_at=self.now,
                    actor="test",
                    attempt=attempt,
                )
            )
        with self.store.write() as tx:
            event_store.append(tx, run_id, self.versions.get(run_id, 0), items, self.now)
        self.versions[run_id] = self.versions.get(run_id, 0) + len(items)

    def submit(self, run_id: str, **spec: Any) -> None:
        built = msgspec.to_builtins(Spec())
        for section, values in spec.items():
            built[section] |= values
        self.add(
            run_id,
            e.RunSubmitted(
                spec=built,
                spec_digest="d" * 64,
                planned_steps=9,
                user="ada",
                data={
                    "train": {"files": ["/d/train.parquet"], "digest": "a" * 64, "rows": 5},
                    "val": {"files": ["/d/val.parquet"], "digest": "b" * 64, "rows": 2},
                },
                model={},
                sftd_version="1.0",
            ),
        )

    def train(self, run_id: str, attempt: int, steps: range, **changes: Any) -> None:
        start = e.AttemptClaimed(daemon="d", host="h", from_step=steps.start - 1)
        self.add(run_id, start, *(step(n, attempt, **changes) for n in steps), attempt=attempt)


def step(number: int, attempt: int = 1, **changes: Any) -> e.StepCompleted:
    fields: dict[str, Any] = {
        "epoch": 0,
        "loss": 1 / number,
        "grad_norm": math.sqrt(number),
        "lr": 1e-5 / number,
        "tokens": 80,
        "tokens_real": 100,
        "tokens_padded": 128,
        "tokens_total": 80 * number,
        "samples": 4,
        "samples_digest": "s",
        "seconds": 0.1 * attempt,
    }
    return e.StepCompleted(step=number, **fields | changes)


def validation(number: int, loss: float = 2.5) -> e.ValidationCompleted:
    return e.ValidationCompleted(step=number, loss=loss, tokens=10, rows=2, seconds=0.1)


def published(number: int) -> e.CheckpointPublished:
    return e.CheckpointPublished(
        step=number, path=f"/c/step-{number}", bytes=1, manifest_digest="m", seconds=1
    )


def feed(store: Store, uri: str, artifacts: Path | None = None, prefix: str = "") -> Feed:
    writer = MlflowWriter(store, uri, artifacts, experiment_prefix=prefix)
    return Feed(store, writer, position_name(uri, prefix))


def expected(store: Store, run_id: str) -> History:
    """The history that the log holds, computed independently: the first value of each step."""
    history: dict[str, dict[int, tuple[int, int, str]]] = {}
    with store.read() as connection:
        for r in event_store.read_stream(connection, run_id, types=reading.STEPS):
            event, at = r.event, r.occurred_at // 1000
            if isinstance(event, e.StepCompleted):
                values = {
                    "loss": event.loss,
                    "grad_norm": event.grad_norm,
                    "lr": event.lr,
                    "system/tokens_total": float(event.tokens_total),
                    "system/step_seconds": event.seconds,
                    "system/tokens_per_second": event.tokens_real / event.seconds,
                }
            elif isinstance(event, e.ValidationCompleted):
                values = {"val_loss": event.loss}
            else:
                continue
            for key, value in values.items():
                history.setdefault(key, {}).setdefault(event.step, (event.step, at, repr(value)))
    return {key: sorted(found.values()) for key, found in history.items()}


class Server:
    """What MLflow shows of the mirror's work."""

    def __init__(self, uri: str) -> None:
        from mlflow.tracking import MlflowClient

        self.uri = uri
        self.client = MlflowClient(uri)

    def run(self, run_id: str, experiment: str = "sftd") -> Any:
        from mlflow.entities import ViewType

        found = self.client.get_experiment_by_name(experiment)
        [run] = self.client.search_runs(
            [found.experiment_id], f"tags.`sftd.run` = '{run_id}'", ViewType.ALL, max_results=5
        )
        return run

    def status(self, run_id: str) -> str:
        return str(self.run(run_id).info.status)

    def history(self, run_id: str, experiment: str = "sftd") -> History:
        """All points, in the order of steps; one that is there twice is seen twice."""
        run = self.run(run_id, experiment)
        return {
            key: sorted(
                (m.step, m.timestamp, repr(m.value))
                for m in self.client.get_metric_history(run.info.run_id, key)
            )
            for key in run.data.metrics
        }


@pytest.fixture(scope="module")
def first_sync(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """(home, process): the first sync of a process of its own with no MLflow store yet."""
    home = tmp_path_factory.mktemp("home")
    engine = open_engine(f"sqlite:///{home}/sftd.db")
    metadata.create_all(engine)
    Log(Store(engine)).submit("template", trainer={"project_name": "template"})
    engine.dispose()
    (home / "cwd").mkdir()
    code = f"""
from pathlib import Path
from sftd.projections.mirrors.feed import Feed
from sftd.projections.mirrors.mlflow.writer import MlflowWriter
from sftd.store.database.engine import Store, open_engine
store = Store(open_engine("sqlite:///{home}/sftd.db"))
writer = MlflowWriter(store, "sqlite:///{home}/new/mlflow.db", Path("{home}/mlartifacts"))
Feed(store, writer, "mlflow:new").sync(lambda: False)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home / "cwd",
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    return home, process


@pytest.fixture(scope="module")
def mlflow_template(first_sync: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """An MLflow store with tables, to be copied."""
    return first_sync[0] / "new/mlflow.db"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """A log in a new SQLite store; nothing may be left in the working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    engine = open_engine(f"sqlite:///{tmp_path}/sftd.db")
    metadata.create_all(engine)
    yield Log(Store(engine))
    engine.dispose()
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.fixture
def new_uri(tmp_path: Path, mlflow_template: Path) -> Iterator[Callable[[], str]]:
    """Makes MLflow stores without runs of the test."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    made: list[str] = []

    def make() -> str:
        path = tmp_path / f"mlflow-{len(made)}.db"
        shutil.copyfile(mlflow_template, path)
        made.append(f"sqlite:///{path}")
        return made[-1]

    yield make
    for uri in made:
        if engine := SqlAlchemyStore._engine_map.pop(uri, None):
            engine.dispose()


@pytest.fixture
def uri(new_uri: Callable[[], str]) -> str:
    """The URI of the MLflow store that a test mirrors into."""
    return new_uri()


@pytest.fixture
def server(uri: str) -> Server:
    return Server(uri)


@pytest.fixture
def new_mirror(log: Log, uri: str, tmp_path: Path) -> Callable[[], Feed]:
    return lambda: feed(log.store, uri, tmp_path / "mlartifacts")


def position(store: Store, uri: str) -> int:
    with store.read() as connection:
        return projection_position(connection, position_name(uri))


def crash_and_redo(log: Log, run_id: str) -> None:
    """A run that crashes after step 7, is redone from step 5, and succeeds."""
    log.submit(run_id)
    log.add(run_id, validation(0))
    log.train(run_id, 1, range(1, 6))
    log.add(run_id, published(5), validation(5), step(6), step(7), attempt=1)
    log.add(run_id, e.AttemptFailed(cause="oom", message="no memory", exit_code=1), attempt=1)
    log.train(run_id, 2, range(6, 10))
    log.add(run_id, validation(9), published(9), attempt=2)
    log.add(run_id, e.RunSucceeded(steps=9, tokens=720, final_checkpoint="/c/step-9"))


def test_history_of_a_redone_run_equals_the_log(
    log: Log, server: Server, new_mirror: Callable[[], Feed], tmp_path: Path
) -> None:
    crash_and_redo(log, "run-1")
    rows = log.versions["run-1"]
    mirror = new_mirror()
    assert mirror.sync(never) == rows
    assert mirror.sync(never) == 0
    assert server.history("run-1") == expected(log.store, "run-1")
    run = server.run("run-1")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-1")
    assert run.info.start_time == (START + 1_000_001) // 1000
    assert run.info.end_time == log.now // 1000
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    tags = run.data.tags
    assert tags["sftd.cursor"] == f"2:{rows}"
    assert (tags["sftd.status"], tags["sftd.attempts"]) == ("succeeded", "2")
    assert tags["sftd.last_checkpoint"] == "/c/step-9"
    assert tags["sftd.goodput"].endswith("%")
    assert "productive" in tags["sftd.time"]
    assert not {"sftd.cause", "sftd.message"} & tags.keys()
    assert run.data.params["optimizer.lr"] == "1e-05"
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert {c: (d.name, d.digest) for c, d in inputs.items()} == {
        "train": ("train.parquet", "a" * 36),
        "val": ("val.parquet", "b" * 36),
    }


def test_a_fresh_mirror_for_every_event_makes_the_same_run(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    crash_and_redo(log, "whole")
    with log.store.read() as connection:
        stream = list(event_store.read_stream(connection, "whole"))
    for r in stream:
        log.add("pieces", r.event, attempt=r.attempt)
        assert new_mirror().sync(never) == (len(stream) + 1 if r.version == 1 else 1)
    assert server.history("pieces") == expected(log.store, "pieces")
    one, other = server.run("whole").data, server.run("pieces").data
    assert one.params == other.params
    volatile = {"sftd.run", "mlflow.runName", "mlflow.note.content"}
    assert {k: v for k, v in one.tags.items() if k not in volatile} == {
        k: v for k, v in other.tags.items() if k not in volatile
    }


def test_a_restart_between_a_step_and_its_redo_sends_nothing_twice(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    """Right after the last steps of an attempt, and after its end."""
    crash_and_redo(log, "whole")
    with log.store.read() as connection:
        stream = list(event_store.read_stream(connection, "whole"))
    end = next(n for n, r in enumerate(stream, 1) if isinstance(r.event, e.AttemptFailed))
    assert isinstance(stream[end - 2].event, e.StepCompleted)
    cuts = {f"cut-{number}": number for number in (end - 2, end - 1, end)}
    for rest in (False, True):
        for run_id, number in cuts.items():
            for r in stream[number:] if rest else stream[:number]:
                log.add(run_id, r.event, attempt=r.attempt)
        new_mirror().sync(never)
    wrong = [run_id for run_id in cuts if server.history(run_id) != expected(log.store, run_id)]
    assert wrong == []
    assert {server.status(run_id) for run_id in cuts} == {"FINISHED"}


def fork(log: Log, parent: str, step: int, run_id: str) -> None:
    """A run that begins after `step` of another."""
    forked = e.RunForked(
        parent=parent,
        step=step,
        sample=0,
        checkpoint=f"/c/step-{step}",
        manifest_digest="m",
        bytes=1,
        tokens_total=80 * step,
        changes={},
        by="ada",
    )
    log.add(run_id, forked)
    log.submit(run_id)
    log.add(run_id, validation(step, 2.0))


def test_a_fork_shows_its_ancestors_curve_up_to_where_it_left(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_and_redo(log, "root")
    fork(log, "root", 7, "child")
    log.train("child", 1, range(8, 10), loss=9.0)
    root = expected(log.store, "root")
    # What the parent does later is no part of it, also at a step that the fork has inherited.
    log.train("root", 3, range(10, 12))
    log.add("root", validation(6, 7.0), attempt=3)
    fork(log, "child", 9, "grandchild")
    log.train("grandchild", 1, range(10, 11), loss=8.0)

    sent = []
    monkeypatch.setattr(feeds, "_PAGE", 4)
    mirror = new_mirror()
    log_points = mirror._writer._tracking.log

    def dies_early(*arguments: Any) -> None:
        sent.append(arguments)
        log_points(*arguments)
        if len(sent) == 9:
            raise Killed

    monkeypatch.setattr(mirror._writer._tracking, "log", dies_early)
    with pytest.raises(Killed):
        mirror.sync(never)
    new_mirror().sync(never)

    child = expected(log.store, "child")
    grandchild = expected(log.store, "grandchild")

    def joined(parent: History, step: int, own: History) -> History:
        theirs = {k: [p for p in v if p[0] < step + (k != "val_loss")] for k, v in parent.items()}
        return {k: both for k in parent if (both := theirs[k] + own.get(k, []))}

    whole_child = joined(root, 7, child)
    assert server.history("child") == whole_child
    assert server.history("grandchild") == joined(whole_child, 9, grandchild)
    assert [p[0] for p in server.history("grandchild")["loss"]] == list(range(1, 11))
    tags = server.run("grandchild").data.tags
    assert (tags["sftd.parent"], tags["sftd.fork_step"]) == ("child", "9")
    assert "sftd.parent" not in server.run("root").data.tags


def test_killed_before_the_position_is_saved(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_and_redo(log, "run-1")

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(feeds, "set_projection_position", kill)
        with pytest.raises(Killed):
            new_mirror().sync(never)
    assert position(log.store, server.uri) == 0
    log.add("run-1", e.ResumeRequested(by="ada"))
    new_mirror().sync(never)
    assert server.history("run-1") == expected(log.store, "run-1")
    assert server.status("run-1") == "SCHEDULED"


@pytest.mark.parametrize("same_mirror", [True, False])
def test_killed_between_the_points_and_the_cursor(
    log: Log,
    server: Server,
    new_mirror: Callable[[], Feed],
    monkeypatch: pytest.MonkeyPatch,
    same_mirror: bool,
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    log.submit("run-1")
    log.train("run-1", 1, range(1, 200))
    log.add("run-1", step(200, loss=math.nan), step(201, loss=math.inf), attempt=1)
    mirror = new_mirror()
    write_tags, calls = SqlAlchemyStore._set_tags, []

    def kill_at_the_second_page(self: Any, run_id: str, tags: Any) -> None:
        calls.append([t.key for t in tags])
        if sum("sftd.cursor" in c for c in calls) == 2:
            raise Killed
        write_tags(self, run_id, tags)

    with monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "_set_tags", kill_at_the_second_page)
        with pytest.raises(Killed):
            mirror.sync(never)
    assert len(server.history("run-1")["loss"]) == 201
    assert int(server.run("run-1").data.tags["sftd.cursor"].removeprefix("2:")) < 200
    # What is sent again is followed by more, and by redone steps: other pages than before.
    log.train("run-1", 2, range(190, 300))
    (mirror if same_mirror else new_mirror()).sync(never)
    history, in_log = server.history("run-1"), expected(log.store, "run-1")
    assert history["loss"][200] == (201, in_log["loss"][200][1], repr(sys.float_info.max))
    history["loss"][200] = in_log["loss"][200]  # infinity, as far as MLflow can hold it
    assert history == in_log
    assert server.run("run-1").data.tags["sftd.cursor"] == f"2:{log.versions['run-1']}"


def test_killed_after_the_run_was_created(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def kill(*_: object, **__: object) -> None:
        raise Killed

    crash_and_redo(log, "run-1")
    for function in ("_log_params", "log_inputs", "update_run_info", "_log_metrics"):
        with monkeypatch.context() as patch:
            patch.setattr(SqlAlchemyStore, function, kill)
            with pytest.raises(Killed):
                new_mirror().sync(never)
    new_mirror().sync(never)
    assert server.history("run-1") == expected(log.store, "run-1")
    assert len(server.run("run-1").inputs.dataset_inputs) == 2


def test_without_its_position_the_mirror_reads_all_and_writes_nothing(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for run_id in ("run-1", "run-2"):
        crash_and_redo(log, run_id)
    log.submit("run-3")
    new_mirror().sync(never)
    end = position(log.store, server.uri)
    with log.store.write(appends=False) as tx:
        tx.execute(sa.delete(projection_positions))

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the mirror wrote")

    for function in ("log_batch", "update_run_info", "create_run", "log_inputs", "create_experiment"):
        monkeypatch.setattr(SqlAlchemyStore, function, refuse)
    monkeypatch.setattr(feeds, "_WINDOW", 7)
    assert new_mirror().sync(never) == end == position(log.store, server.uri)


def test_status_follows_the_run(log: Log, server: Server, new_mirror: Callable[[], Feed]) -> None:
    mirror = new_mirror()

    def after(*new: e.Event, attempt: int | None = None) -> str:
        log.add("run-1", *new, attempt=attempt)
        mirror.sync(never)
        return server.status("run-1")

    log.submit("run-1")
    mirror.sync(never)
    assert server.status("run-1") == "SCHEDULED"
    claimed = e.AttemptClaimed(daemon="d", host="h", from_step=0)
    assert after(claimed, attempt=1) == "RUNNING"
    assert after(step(1), attempt=1) == "RUNNING"
    assert (
        after(e.AttemptFailed(cause="nccl", message="lost", exit_code=1, retry_at=1), attempt=1) == "RUNNING"
    )
    assert after(claimed, attempt=2) == "RUNNING"
    assert after(e.AttemptLost(message="gone"), e.RunFailed(cause="lost", message="gave up")) == "FAILED"
    run = server.run("run-1")
    assert run.info.end_time == log.now // 1000
    assert run.data.tags["sftd.message"] == "gave up"
    assert after(e.ResumeRequested(by="ada")) == "SCHEDULED"
    assert after(claimed, step(2, 3), attempt=3) == "RUNNING"
    assert not {"sftd.cause", "sftd.message"} & server.run("run-1").data.tags.keys()
    assert after(e.StopRequested(by="ada")) == "RUNNING"
    assert after(e.RunCancelled(by="ada")) == "KILLED"
    # The end moves, though the status stays, when all of a second end comes at once.
    assert after(e.ResumeRequested(by="ada"), claimed, e.RunCancelled(by="ada")) == "KILLED"
    assert server.run("run-1").info.end_time == log.now // 1000
    assert server.history("run-1") == expected(log.store, "run-1")


def test_nan_and_long_params(log: Log, server: Server, new_mirror: Callable[[], Feed]) -> None:
    files = [f"/data/{n:04}.parquet" for n in range(500)]
    overrides = {f"key_{n}": n for n in range(150)}
    log.submit("run-1", data={"train_files": files}, model={"override_config": overrides})
    log.train("run-1", 1, range(1, 4), loss=math.nan)
    log.add("run-1", validation(3, math.nan), attempt=1)
    new_mirror().sync(never)
    assert server.history("run-1") == expected(log.store, "run-1")
    params = server.run("run-1").data.params
    assert len(params["data.train_files"]) == 6000
    assert params["model.override_config.key_149"] == "149"


def test_interleaved_runs(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_WINDOW", 5)
    log.submit("run-1", trainer={"experiment_name": "first"})
    log.submit("run-2")
    for start in range(1, 40, 3):
        for run_id in ("run-1", "run-2"):
            log.train(run_id, start, range(start, start + 3), loss=float(start + len(run_id)))
    mirror = new_mirror()
    for _ in range(3):
        # Stops after a few requests, wherever that is.
        answers = iter([False] * 9 + [True])
        mirror.sync(lambda answers=answers: next(answers))
    mirror.sync(never)
    for run_id in ("run-1", "run-2"):
        assert server.history(run_id) == expected(log.store, run_id)
    assert server.run("run-1").info.run_name == "first run-1"


def test_types_of_a_newer_sftd_are_passed_over(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    log.submit("run-1")
    log.add("run-1", e.AttemptAdopted(daemon="d", host="h", pid=1))
    with log.store.write() as tx:
        tx.execute(sa.update(events).where(events.c.version == 2).values(type="Dreamt"))
    mirror = new_mirror()
    assert mirror.sync(never) == 2
    assert server.run("run-1").data.tags["sftd.cursor"] == "2:2"
    log.train("run-1", 1, range(1, 4))
    mirror.sync(never)
    assert server.history("run-1") == expected(log.store, "run-1")


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_deleted_in_mlflow(log: Log, server: Server, new_mirror: Callable[[], Feed], what: str) -> None:
    log.submit("run-1")
    log.train("run-1", 1, range(1, 4))
    mirror = new_mirror()
    mirror.sync(never)
    run = server.run("run-1")
    if what == "run":
        server.client.delete_run(run.info.run_id)
    else:
        server.client.delete_experiment(run.info.experiment_id)
    with log.store.write(appends=False) as tx:
        tx.execute(sa.delete(projection_positions))
    new_mirror().sync(never)
    assert server.run("run-1").info.lifecycle_stage == "deleted", "there was nothing new to say"
    log.train("run-1", 2, range(4, 6))
    with pytest.raises(MirrorUnavailable):
        mirror.sync(never)  # it learns of the deletion
    mirror.sync(never)
    assert server.run("run-1").info.run_id == run.info.run_id
    assert server.run("run-1").info.lifecycle_stage == "active"
    assert server.history("run-1") == expected(log.store, "run-1")


def test_gone_for_good_is_written_again(
    log: Log, new_uri: Callable[[], str], new_mirror: Callable[[], Feed]
) -> None:
    log.submit("run-1")
    log.train("run-1", 1, range(1, 400))
    new_mirror().sync(never)
    log.add("run-1", step(400), attempt=1)
    # The position says that only the last step is new; an empty MLflow says that all is.
    other = new_uri()
    feed(log.store, other).sync(never)
    assert Server(other).history("run-1") == expected(log.store, "run-1")


def test_on_every_database(store: Store, uri: str, server: Server) -> None:
    log = Log(store)
    crash_and_redo(log, "run-1")
    feed(store, uri).sync(never)
    log.add("run-1", e.ResumeRequested(by="ada", from_step=5))
    log.train("run-1", 3, range(6, 12))
    log.add("run-1", validation(9), validation(11), attempt=3)
    feed(store, uri).sync(never)
    assert server.history("run-1") == expected(store, "run-1")
    assert server.status("run-1") == "RUNNING"


def test_renamed_experiment_stays_in_use(log: Log, server: Server, new_mirror: Callable[[], Feed]) -> None:
    log.submit("run-1", trainer={"project_name": 'it\'s a "name"'})
    new_mirror().sync(never)
    found = server.client.get_experiment_by_name('it\'s a "name"')
    server.client.rename_experiment(found.experiment_id, "better")
    log.train("run-1", 1, range(1, 4))
    new_mirror().sync(never)
    assert server.run("run-1", "better").data.tags["sftd.cursor"] == "2:5"


def test_a_second_set_of_experiments(
    log: Log, uri: str, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    crash_and_redo(log, "run-1")
    new_mirror().sync(never)
    feed(log.store, uri, prefix="new/").sync(never)
    assert server.run("run-1", "new/sftd").info.run_id != server.run("run-1").info.run_id
    assert server.run("run-1", "new/sftd").data.metrics == server.run("run-1").data.metrics


def test_mlflow_sets_up_its_store_in_silence(
    first_sync: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    home, done = first_sync
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((home / "cwd").iterdir()) == []
    engine = sa.create_engine(f"sqlite:///{home}/new/mlflow.db")
    with engine.connect() as connection:
        places = connection.execute(sa.text("SELECT artifact_location FROM experiments")).scalars().all()
    engine.dispose()
    assert len(places) == 2
    assert all(place.startswith(f"file://{home}/mlartifacts") for place in places)


def test_two_mirrors_do_not_send_twice(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    write, sent = SqlAlchemyStore._log_metrics, []

    def count(self: Any, run_id: str, metrics: list[Any]) -> None:
        sent.extend((m.key, m.step) for m in metrics)
        write(self, run_id, metrics)

    monkeypatch.setattr(SqlAlchemyStore, "_log_metrics", count)
    log.submit("run-1")
    mirrors = new_mirror(), new_mirror()
    for start in range(1, 20, 2):
        log.train("run-1", start, range(start, start + 2))
        mirrors[start % 4 == 1].sync(never)
    assert len(sent) == len(set(sent)) == 20 * 6
    assert server.history("run-1") == expected(log.store, "run-1")


def test_what_a_mirror_sends_after_another_took_its_turn_is_put_right(
    log: Log, uri: str, new_mirror: Callable[[], Feed]
) -> None:
    log.submit("run-1")
    log.train("run-1", 1, range(1, 301))
    log.add("run-1", e.RunSucceeded(steps=300, tokens=1, final_checkpoint="c"))
    frozen, other = new_mirror(), new_mirror()
    asked = 0

    def lost() -> bool:
        """Before its first request, its host sleeps until the other has done all of it."""
        nonlocal asked
        asked += 1
        # In the loop over the log, in that over the run, and right before the request.
        if asked == 3:
            other.sync(never)
        return asked > 3

    frozen.sync(lost)
    tracking = mlflow_client.Tracking(uri, None)
    assert compare_run(log.store, tracking, "", "run-1", 302).behind
    other.sync(never)
    assert compare_run(log.store, tracking, "", "run-1", 303).is_equal


@dataclass
class Clock:
    """Time that passes when a test says so."""

    seconds: float = 1_000.0

    def monotonic(self) -> float:
        return self.seconds

    def micros(self) -> int:
        return int(self.seconds * 1_000_000)


def test_a_long_inherited_curve_is_sent_by_one_daemon(
    store: Store, uri: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = Store(store.engine, clock=lambda _connection, local: local)
    monkeypatch.setattr(mirror_turn.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(mlflow_writer, "METRICS_PER_BATCH", 60)
    log, held = Log(store), 60.0
    log.submit("root")
    log.train("root", 1, range(1, 101))
    feed(store, uri).sync(never)
    fork(log, "root", 100, "child")
    turns, feed_of, sent = {}, dict[str, Feed](), dict[str, int]()
    for name in ("one", "two"):
        feed_of[name] = one = feed(store, uri, tmp_path / "mlartifacts")
        context = Context(name, clock.micros)
        turns[name] = MirrorTurn("MLflow", lambda one=one: one, store, context, "mlflow:x", name, held)  # type: ignore[misc]
        sent[name] = 0
        with store.write(appends=False) as tx:
            daemons.register(tx, DaemonRow(name, f"host of {name}", 1, 1.0, "/home", "[]", 1, 1))

    def slowly(name: str, seconds: Callable[[], float]) -> None:
        """Each request of a daemon takes so long; in the middle of it the other one asks whether it is its turn."""
        tracking = feed_of[name]._writer._tracking  # type: ignore[attr-defined]
        log_points = tracking.log

        def log_slowly(*arguments: Any) -> None:
            sent[name] += 1
            log_points(*arguments)
            clock.seconds += seconds()
            if name == "one":
                turns["two"].sync(never)

        monkeypatch.setattr(tracking, "log", log_slowly)

    # Its host sleeps at the fourth request, for longer than the claim lasts.
    slowly("one", lambda: held / 2 if sent["one"] < 4 else held + 1)
    slowly("two", lambda: 0.0)
    assert turns["one"].sync(never) == 0
    assert sent["one"] == 4, "it sends no more once another has the turn"
    assert sent["two"] > 10, "which sends all of it, and did not begin before"
    history = server.history("child")
    assert [p[0] for p in history["loss"]] == list(range(1, 101))
    assert history["loss"] == server.history("root")["loss"]
    assert compare_run(store, mlflow_client.Tracking(uri, None), "", "child", 3).is_equal


def test_an_mlflow_that_is_away_is_named_without_its_password(log: Log, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        log.submit("run-1")
        with pytest.raises(MirrorUnavailable) as caught:
            feed(log.store, f"http://ada:secret@127.0.0.1:{port}").sync(never)
    assert str(caught.value) == f"MLflow at http://127.0.0.1:{port} does not answer: Connection refused"


def answer(step: int, text: str) -> e.SampleGenerated:
    return e.SampleGenerated(step=step, prompt="the capital of France?", text=text, tokens=2, stopped=True)


def sampled(percent: float) -> e.SystemSampled:
    return e.SystemSampled(host="h", cpu_percent=percent, memory_used_bytes=2**30, memory_total_bytes=2**31)


def test_sample_answers_are_a_table_of_mlflow_s(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    log.submit("run-1")
    log.train("run-1", 1, range(1, 5))
    log.add("run-1", answer(4, "Berlin"), attempt=1)
    mirror = new_mirror()
    mirror.sync(never)
    log.train("run-1", 2, range(3, 9))
    log.add("run-1", answer(4, "again"), answer(8, "Paris"), attempt=2)
    new_mirror().sync(never)
    run = server.run("run-1")
    table = json.loads((Path(run.info.artifact_uri.removeprefix("file://")) / "samples.json").read_text())
    assert table["columns"][:3] == ["step", "prompt", "answer"]
    assert [(row[0], row[2]) for row in table["data"]] == [(4, "Berlin"), (8, "Paris")]
    # By this MLflow itself looks for tables.
    marked = 'tags.`mlflow.loggedArtifacts` LIKE \'%"path"%:%"samples.json",%"type"%:%"table"%\''
    assert len(server.client.search_runs([run.info.experiment_id], marked)) == 1
    assert run.data.tags["sftd.samples"] == "samples.json"


def test_artifacts_that_cannot_be_written_keep_no_metric_waiting(
    log: Log, server: Server, new_mirror: Callable[[], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials for the bucket")

    log.submit("run-1")
    log.train("run-1", 1, range(1, 5))
    log.add("run-1", answer(4, "Berlin"), attempt=1)
    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "log_artifact", refuse)
        new_mirror().sync(never)
    assert server.history("run-1") == expected(log.store, "run-1")
    assert "no credentials for the bucket" in server.run("run-1").data.tags["sftd.samples"]


def test_looks_at_the_host_are_counted_on_across_mirrors_and_attempts(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    log.submit("run-1")
    for attempt in (1, 2):
        log.train("run-1", attempt, range(1, 4))
        log.add("run-1", sampled(10.0 * attempt), sampled(10.0 * attempt + 5), attempt=attempt)
        new_mirror().sync(never)
    points = server.history("run-1")["system/cpu_utilization_percentage"]
    assert [(number, value) for number, _, value in points] == [
        (0, "10.0"),
        (1, "15.0"),
        (2, "20.0"),
        (3, "25.0"),
    ]
    assert server.history("run-1")["loss"] == expected(log.store, "run-1")["loss"]


def test_a_host_with_many_gpus_fits_into_requests(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    gpus = [
        e.GpuSample(
            index=i,
            utilization_percent=90.0,
            memory_used_bytes=2**30,
            memory_total_bytes=2**31,
            power_watts=1.0,
        )
        for i in range(16)
    ]
    log.submit("run-1")
    log.add("run-1", *(msgspec.structs.replace(sampled(1.0), gpus=gpus) for _ in range(40)), attempt=1)
    new_mirror().sync(never)
    assert len(server.history("run-1")["system/gpu_15_power_usage_watts"]) == 40


def test_rebuilt_from_the_log_is_proven_equal_and_what_differs_is_named(
    log: Log,
    uri: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifacts = tmp_path / "mlartifacts"
    tracking = mlflow_client.Tracking(uri, artifacts)
    crash_and_redo(log, "root")
    fork(log, "root", 7, "child")
    log.train("child", 1, range(8, 10), loss=math.inf)
    log.add("child", sampled(3.0), answer(9, "Paris"), attempt=1)

    def rebuilt() -> list[MirrorComparison]:
        return list(rebuild(log.store, uri, artifacts, "rebuilt/", ()))

    # Killed after the first run, and called again; then there is nothing left to write.
    next(iter(rebuild(log.store, uri, artifacts, "rebuilt/", ())))
    found = rebuilt()
    assert [(c.run_id, c.experiment, c.is_equal) for c in found] == [
        ("root", "rebuilt/sftd", True),
        ("child", "rebuilt/sftd", True),
    ]
    assert found[0].points == sum(map(len, expected(log.store, "root").values()))
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_client.Tracking, "log", lambda *_: pytest.fail("it wrote"))
        assert rebuilt() == found

    run = server.run("child", "rebuilt/sftd")
    server.client.log_metric(run.info.run_id, "lr", 7.0, timestamp=1, step=3)
    server.client.set_terminated(run.info.run_id, "FAILED")
    with log.store.write() as tx:
        tx.execute(
            sa.update(events)
            .where(events.c.run_id == "child", events.c.type == "ValidationCompleted")
            .values(occurred_at=START)
        )
    log.add("child", step(10), attempt=1)
    checked = compare_run(log.store, tracking, "rebuilt/", "child", log.versions["child"])
    assert not checked.is_equal
    assert checked.behind == 1
    told = "\n".join(checked.differences)
    assert "status: MLflow has FAILED, the log RUNNING" in told
    assert "val_loss: 1 point of the log not in MLflow, the first at step 7" in told
    assert "lr: 1 point in MLflow not in the log, the first at step 3" in told
    assert "loss:" not in told.replace("val_loss:", "")
    lost = compare_run(log.store, tracking, "nowhere/", "child", 1)
    assert lost.differences == ["MLflow has no such run"]


def test_an_mlflow_that_does_not_answer_is_named_without_its_password() -> None:
    address = "http://ada:hush-hush-9@127.0.0.1:1"
    with pytest.raises(MirrorUnavailable, match="MLflow at http://") as refused:
        mlflow_client.Tracking(address, None).find_experiment(["any"])
    assert "hush" not in str(refused.value)
    assert "127.0.0.1:1" in str(refused.value)


def test_the_commands_find_the_runs_and_their_pages(
    tmp_path: Path,
    uri: str,
    server: Server,
    clean_environment: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    settings = read_settings()
    app.make_home(settings)
    store = app.open_store(settings)
    log = Log(store)
    crash_and_redo(log, "root")
    fork(log, "root", 7, "child")
    artifacts = settings.mlflow_artifacts
    folder = tmp_path / "model"
    folder.mkdir()
    config = b'{"base_model_name_or_path": "org/base"}'
    (folder / "adapter_config.json").write_bytes(config)
    line = f"{hashlib.sha256(config).hexdigest()}  adapter_config.json\n"
    digest = hashlib.sha256(line.encode()).hexdigest()
    exported = e.ModelExported(step=9, path=str(folder), bytes=2, digest=digest, dtype="float32")
    log.add("root", exported)

    def sftd(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    not_yet = sftd("mlflow", "check")
    assert (not_yet.exit_code, "MLflow has no such run" in not_yet.stderr) == (1, True)
    assert "it has no run of root yet" in sftd("mlflow", "register", "root", "m").stderr
    assert ui._page(settings, ()) == ""
    feed(store, uri, artifacts).sync(never)
    told = [json.loads(line) for line in sftd("mlflow", "check", "--json").stdout.splitlines()]
    json_fields.check("mlflow check", told[0])
    assert [(t["run_id"], t["is_equal"], t["behind"]) for t in told] == [
        ("root", True, 0),
        ("child", True, 0),
    ]
    assert "equal to the log: 2 of 2 runs" in sftd("mlflow", "rebuild").stdout
    rebuilt = json.loads(sftd("mlflow", "rebuild", "child", "--json").stdout)
    json_fields.check("mlflow rebuild", rebuilt)
    assert (rebuilt["run_id"], rebuilt["is_equal"]) == ("child", True)
    assert "'a/b' cannot be a model's name" in sftd("mlflow", "register", "root", "a/b").stderr
    assert "root has no export of step 7" in sftd("mlflow", "register", "root", "m", "--step", "7").stderr

    root, child = server.run("root").info, server.run("child").info
    training, runs = "workflowType=machine_learning", f"#/experiments/{root.experiment_id}/runs"
    assert ui._page(settings, ()) == f"{runs}?compareRunsMode=CHART&{training}"
    assert ui._page(settings, ("ro",)) == f"{runs}/{root.run_id}?{training}"
    both = urllib.parse.unquote(ui._page(settings, ("root", "child")))
    these = f"attributes.run_id IN ('{root.run_id}', '{child.run_id}')"
    assert both == f"{runs}?compareRunsMode=CHART&searchFilter={these}&{training}"
    log.submit("elsewhere", trainer={"project_name": "other"})
    feed(store, uri, artifacts).sync(never)
    across = urllib.parse.unquote(ui._page(settings, ("root", "elsewhere")))
    other = server.run("elsewhere", "other").info
    assert across.startswith(
        f'#/compare-experiments/s?experiments=["{root.experiment_id}", "{other.experiment_id}"]'
    )

    # An export that is registered, and the same one touched since.
    for _ in range(2):
        assert "as support version 1" in sftd("mlflow", "register", "root", "support", "--step", "9").stdout
    with store.read() as connection:
        [registered] = event_store.read_stream(connection, "root", types=("ModelRegistered",))
    assert (registered.event.name, registered.event.model_version) == ("support", "1")
    # Who finds the adapter in the registry sees what it belongs to.
    assert server.client.get_model_version("support", "1").tags["sftd.base_model"] == "org/base"
    (folder / "adapter_config.json").write_text("{ }")
    assert "differs from the export" in sftd("mlflow", "register", "root", "support").stderr
    store.engine.dispose()


def test_a_model_is_registered_once(
    log: Log, uri: str, server: Server, new_mirror: Callable[[], Feed], tmp_path: Path
) -> None:
    log.submit("run-1")
    mirror = new_mirror()
    mirror.sync(never)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    uuid, tracking = server.run("run-1").info.run_id, mlflow_client.Tracking(uri, tmp_path / "mlartifacts")

    def register(digest: str) -> str:
        return tracking.register(uuid, folder, "models/step-4", "support", {"sftd.export_digest": digest})

    assert [register("a"), register("a"), register("b")] == ["1", "1", "2"]
    version = server.client.get_model_version("support", "1")
    assert (version.run_id, version.tags["sftd.export_digest"]) == (uuid, "a")
    there = Path(server.client.get_model_version_download_uri("support", "1").removeprefix("file://"))
    assert (there / "config.json").read_text() == "{}"
    registered = e.ModelRegistered(step=4, name="support", model_version="2", digest="b", by="ada")
    log.add("run-1", registered)
    mirror.sync(never)
    assert server.run("run-1").data.tags["sftd.registered_model"] == "support version 2"


def as_it_was(log: Log, server: Server, run_id: str) -> str:
    """A run as the mirror of form 1 wrote it, with what a person added. Returns the id that MLflow gave it."""
    from mlflow.entities import Metric, Param, RunTag

    client = server.client
    experiment = client.create_experiment("default", tags={"sftd.experiment": "default"})
    uuid = str(client.create_run(experiment, START // 1000 + 1000, {"sftd.run": run_id}, "mine").info.run_id)
    points = []
    for key, rows in expected(log.store, run_id).items():
        points += [Metric(key.removeprefix("system/"), float(v), at, number) for number, at, v in rows]
    client.log_batch(uuid, metrics=[*points, Metric("goodput", 0.9, 5, 9), Metric("my_score", 3.0, 5, 9)])
    client.log_batch(uuid, params=[Param("launch.slurm.time", ""), Param("my_param", "1")])
    said = {"sftd.cursor": str(log.versions[run_id]), "sftd.cause": "", "sftd.message": "", "mine": "kept"}
    client.log_batch(uuid, tags=[RunTag(key, value) for key, value in said.items()])
    client.set_tag(uuid, "mlflow.note.content", "a note of mine")
    return uuid


def test_a_mirror_of_an_older_form_is_written_again_without_loss_or_doubles(
    log: Log,
    uri: str,
    server: Server,
    new_mirror: Callable[[], Feed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash_and_redo(log, "run-1")
    uuid = as_it_was(log, server, "run-1")
    tracking = mlflow_client.Tracking(uri, None)
    told = compare_run(log.store, tracking, "", "run-1", log.versions["run-1"])
    assert "an older sftd wrote it" in told.differences[0]

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # Between what is removed and what comes in its place.
        patch.setattr(mlflow_client.Tracking, "log", kill)
        with pytest.raises(Killed):
            new_mirror().sync(never)
    new_mirror().sync(never)
    run = server.run("run-1", "default")
    assert run.info.run_id == uuid
    history = server.history("run-1", "default")
    assert history.pop("my_score") == [(9, 5, "3.0")]
    assert history == expected(log.store, "run-1")
    assert "launch.slurm.time" not in run.data.params
    assert run.data.params["my_param"] == "1"
    assert not {"sftd.cause", "sftd.message"} & run.data.tags.keys()
    kept = run.data.tags["mine"], run.data.tags["mlflow.note.content"], run.info.run_name
    assert kept == ("kept", "a note of mine", "mine")
    assert compare_run(log.store, tracking, "", "run-1", log.versions["run-1"]).behind == 0
    # New runs of a project that nobody named join those that are there.
    log.submit("run-2")
    new_mirror().sync(never)
    assert server.run("run-2", "default").info.experiment_id == run.info.experiment_id


def test_a_run_of_an_older_form_that_was_deleted_stays_deleted(
    log: Log, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    crash_and_redo(log, "run-1")
    server.client.delete_run(as_it_was(log, server, "run-1"))
    new_mirror().sync(never)
    assert server.run("run-1", "default").info.lifecycle_stage == "deleted"


def test_what_a_resume_changes_is_in_tags_and_checked(
    log: Log, uri: str, server: Server, new_mirror: Callable[[], Feed]
) -> None:
    crash_and_redo(log, "run-1")
    mirror, tracking = new_mirror(), mlflow_client.Tracking(uri, None)

    def resumed(steps: int, digest: str) -> dict[str, str]:
        spec = msgspec.to_builtins(Spec())
        spec["checkpoint"] |= {"keep_last": steps}
        log.add("run-1", e.ResumeRequested(by="ada", spec=spec, spec_digest=digest))
        mirror.sync(never)
        assert compare_run(log.store, tracking, "", "run-1", log.versions["run-1"]).is_equal
        return dict(server.run("run-1").data.tags)

    tags = resumed(1, "e" * 64)
    assert (tags["sftd.changed.checkpoint.keep_last"], tags["sftd.spec_digest"]) == ("1", "e" * 64)
    assert server.run("run-1").data.params["checkpoint.keep_last"] == "2", "as submitted"
    server.client.set_tag(server.run("run-1").info.run_id, "sftd.changed.checkpoint.keep_last", "7")
    told = compare_run(log.store, tracking, "", "run-1", log.versions["run-1"]).differences
    assert told == ["tags: sftd.changed.checkpoint.keep_last"]
    assert "sftd.changed.checkpoint.keep_last" not in resumed(2, "d" * 64)
