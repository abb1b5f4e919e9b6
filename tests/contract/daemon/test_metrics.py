"""The daemon's metrics for Prometheus, read back by a strict reader, from a real database."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sftd.daemon.metrics import Metrics
from sftd.domain.log import events as e
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.spec import Spec
from sftd.launcher.inventory import Inventory
from sftd.projections import views
from sftd.projections.mirrors import MIRRORS
from sftd.projections.mirrors.mlflow.writer import position_name
from sftd.settings import read
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.log.positions import set_projection_position
from sftd.store.queue import leases, order
from sftd.wire.attempt.journal import backlog
from tests.builders.log.histories import step, submitted
from tests.builders.prometheus import parse

SECOND = 1_000_000
NOW = 1_000 * SECOND
SPEC = Spec(model=Model(partial_pretrain="m"), data=Data(train_files=["t"]))


class Driven:
    """An attempt whose journal has so much that the log does not have."""

    def __init__(self, lines: int = 3, since: int | None = NOW - 2 * SECOND) -> None:
        self._backlog = lines, since

    def backlog(self) -> tuple[int, int | None]:
        return self._backlog


def add(store: Store, run_id: str, *told: tuple[int, e.Event], version: int = 0) -> None:
    new = [
        e.NewEvent(event=event, event_id=str(uuid.uuid4()), occurred_at=at * SECOND, actor="test")
        for at, event in told
    ]
    with store.write() as tx:
        event_store.append(tx, run_id, version, new, told[-1][0] * SECOND)


@pytest.fixture
def filled(store: Store) -> Store:
    """Four runs: one ready since 100 s, one to be retried later, one driven, one that has ended."""
    store.before_commit = (views.catch_up,)
    # The time of these tests, and not the server's.
    store.clock = lambda _connection, local: local
    with store.write() as tx:
        for n, run_id in enumerate(("ready", "delayed", "driven", "done")):
            leases.enqueue(tx, run_id, 0, NOW - (100 + n) * SECOND)
        leases.wait_again(tx, "delayed", NOW + SECOND)
        leases.leave(tx, "done")
        leases.lease(tx, "driven", 1, "token", "daemon", NOW)
    claimed = e.AttemptClaimed(daemon="d", host="h", from_step=0)
    add(store, "ready", (900, submitted(SPEC)))
    add(store, "delayed", (900, submitted(SPEC)), (900, claimed))
    add(
        store,
        "driven",
        (900, submitted(SPEC)),
        (900, claimed),
        (940, step(1, seconds=20.0)),
        (960, step(2, seconds=20.0)),
    )
    add(store, "done", (900, submitted(SPEC)), (901, e.RunCancelled(by="ada")))
    return store


def told(store: Store, home: Path, driven: dict[str, Any], **more: str) -> dict[str, Any]:
    settings = read({"SFTD_HOME": str(home), **more})
    inventory = Inventory(gpus=2, cpu_slots=4)
    inventory.restore("driven", ["cuda:1"])
    home.mkdir(exist_ok=True)
    writer = Metrics(store, settings, inventory, 'host-1-"a\\b', MIRRORS)
    writer.write_when_due(driven, NOW)
    return parse(settings.metrics_file.read_text())


def test_everything_is_told(filled: Store, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with filled.write(appends=False) as tx:
        name = position_name(f"sqlite:///{home}/mlflow.db")
        behind = event_store.last_position(tx.connection) - 3
        set_projection_position(tx.connection, name, behind)
    found = told(
        filled, home, {"driven": Driven(), "newer": Driven(1, NOW - SECOND), "idle": Driven(0, None)}
    )

    def one(name: str, **labels: str) -> float:
        value: float = found[name][tuple(sorted(labels.items()))]
        return value

    assert one("sftd_daemon_last_tick_timestamp_seconds") == 1000
    [(info, _)] = found["sftd_daemon_info"].items()
    assert dict(info)["daemon_id"] == 'host-1-"a\\b'
    assert [one("sftd_queue_runs", state=s) for s in ("ready", "delayed", "leased")] == [1, 1, 1]
    assert one("sftd_queue_oldest_wait_seconds") == 100
    statuses = {dict(labels)["status"]: n for labels, n in found["sftd_runs"].items()}
    assert {status: n for status, n in statuses.items() if n} == {
        "queued": 1,
        "starting": 1,
        "running": 1,
        "cancelled": 1,
    }
    assert statuses["failed"] == 0, "one that is not there yet is told, too: graphs begin at 0"
    assert (one("sftd_devices", kind="gpu"), one("sftd_devices_used", kind="gpu")) == (2, 1)
    assert (one("sftd_devices", kind="cpu"), one("sftd_devices_used", kind="cpu")) == (4, 0)
    assert one("sftd_attempts_driven") == 3
    assert (one("sftd_ingest_lag_events"), one("sftd_ingest_lag_seconds")) == (4, 2)
    lags = [one(f"sftd_mirror_lag_{unit}", mirror="MLflow") for unit in ("events", "seconds")]
    assert lags == [3, 1000 - 960]
    assert one("sftd_run_goodput_ratio", run_id="driven") == 0.4
    assert (home / "metrics.prom").stat().st_mode & 0o777 == 0o600


def test_the_queue_goes_by_the_clock_that_all_daemons_share(filled: Store, tmp_path: Path) -> None:
    filled.clock = lambda _connection, _local: NOW
    settings = read({"SFTD_HOME": str(tmp_path)})
    # This host's clock is an hour fast.
    Metrics(filled, settings, Inventory(0, 1), "d").write({}, NOW + 3600 * SECOND)
    found = parse(settings.metrics_file.read_text())
    assert found["sftd_queue_runs"][(("state", "delayed"),)] == 1
    assert found["sftd_queue_oldest_wait_seconds"] == {(): 100}


def test_what_waits_for_a_run_or_a_person_is_not_ready(filled: Store, tmp_path: Path) -> None:
    """An alarm on how long a run has been ready would go off for each `--after`."""
    with filled.write() as tx:
        for run_id in ("later", "next", "kept"):
            leases.enqueue(tx, run_id, 0, NOW - 900 * SECOND)
        order.set_after(tx, "later", ["done", "driven"])
        order.set_after(tx, "next", ["good"])
        leases.hold(tx, "kept")
        leases.hold(tx, "next")
    add(
        filled, "good", (900, submitted(SPEC)), (901, e.RunSucceeded(steps=4, tokens=1, final_checkpoint="c"))
    )
    found = told(filled, tmp_path / "home", {})
    states = {dict(labels)["state"]: n for labels, n in found["sftd_queue_runs"].items()}
    assert states == {"ready": 1, "delayed": 1, "leased": 1, "dependent": 1, "held": 2}
    assert found["sftd_queue_oldest_wait_seconds"] == {(): 100}
    with filled.write() as tx:
        leases.release(tx, "next")
    found = told(filled, tmp_path / "home", {})
    assert found["sftd_queue_oldest_wait_seconds"] == {(): 900}


def test_an_empty_database_and_a_file_elsewhere(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "collector" / "sftd.prom"
    file.parent.mkdir()
    found = told(store, tmp_path / "home", {}, SFTD_METRICS_FILE=str(file))
    assert found["sftd_queue_oldest_wait_seconds"] == {(): 0}
    assert found["sftd_ingest_lag_seconds"] == {(): 0}
    assert found["sftd_mirror_lag_events"] == {(("mirror", "MLflow"),): 0}
    assert found["sftd_run_goodput_ratio"] == {}
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_the_goodput_of_driven_runs_is_up_to_date(filled: Store, tmp_path: Path) -> None:
    settings = read({"SFTD_HOME": str(tmp_path)})
    writer = Metrics(filled, settings, Inventory(0, 1), "d")
    writer.write({"driven": Driven()}, NOW)
    add(filled, "driven", (980, step(3, seconds=20.0)), version=4)
    writer.write({"driven": Driven()}, NOW)
    found = parse(settings.metrics_file.read_text())
    assert found["sftd_run_goodput_ratio"] == {(("run_id", "driven"),): 0.6}
    assert "sftd_mirror_lag_events" not in found


def test_a_file_that_cannot_be_written_stops_nothing(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = read({"SFTD_HOME": str(tmp_path), "SFTD_METRICS_FILE": str(tmp_path / "nowhere" / "x.prom")})
    writer = Metrics(store, settings, Inventory(0, 1), "d")
    writer.write({}, NOW)
    writer.write({}, NOW)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["the metrics file cannot be written"]


def test_a_database_that_is_down_is_the_loop_s_to_report(tmp_path: Path) -> None:
    store = Store(sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    writer = Metrics(store, read({"SFTD_HOME": str(tmp_path)}), Inventory(0, 1), "d")
    with pytest.raises(sa.exc.OperationalError):
        writer.write({}, NOW)


def test_a_journal_s_backlog(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert backlog(path, 0) == (0, None)
    line = b'{"t":%d,"type":"X","v":1,"p":{}}\n'
    path.write_bytes(line % 5 + line % 7 + line % 9 + b'{"t":')
    assert backlog(path, 0) == (3, 5)
    assert backlog(path, len(line % 5)) == (2, 7)
    assert backlog(path, 3 * len(line % 5)) == (0, None)
    path.write_bytes(b"nonsense\n")
    assert backlog(path, 0) == (1, None)


@pytest.mark.parametrize(
    "text",
    [
        "x 1",
        "x 1\n",
        "# TYPE x gauge\nx 1\n",
        "# HELP x a\n# TYPE x gauge\nx 1\nx 2\n",
        "# HELP x a\n# TYPE x gauge\ny 1\n",
        '# HELP x a\n# TYPE x gauge\nx{a="b"c"} 1\n',
        "# HELP x a\n# TYPE x gauge\nx one\n",
        "# HELP x a\n# TYPE x gauge\nx  1\n",
    ],
)
def test_the_reader_is_strict(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)
