"""From submit to success, as a user and as a script see it; on SQLite with MLflow, and on PostgreSQL."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.builders.log.view_rows import view_rows
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import write_rows
from tests.builders.prometheus import parse


@pytest.fixture
def postgres_url(postgres_server: sa.URL) -> Iterator[str]:
    """An empty database on a real PostgreSQL."""
    name = f"process_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield postgres_server.set(database=name).render_as_string(hide_password=False)
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


SECRET = "planted-c0ffee-secret"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "PGPASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
)


def assert_secrets_are_nowhere(home: Home) -> None:
    """No file holds what the environment did: no event, log, manifest, checkpoint, database, MLflow store."""
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert {"sftd.db", "daemon.log", "journal", "order.json", "manifest.json"} <= {f.name for f in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def is_mirrored(file: Path) -> bool:
    """Whether MLflow's file has a run that has ended. A daemon that is stopped waits ten seconds for it, of which MLflow's own
    start may take more."""
    try:
        # Read only: else it would be made here, and not by the daemon.
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    except sqlite3.OperationalError:
        # Neither it nor its tables are made yet.
        return False


def test_submit_wait_and_the_mlflow_mirror(cold_home: Home) -> None:
    home = cold_home
    home.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{home.path}/mlflow.db"
    home.env["SFTD_LOG_FORMAT"] = "json"
    home.env |= dict.fromkeys(SECRET_VARIABLES, SECRET)
    daemon = home.start_daemon()
    done = home.run("submit", str(home.config), "trainer.experiment_name=first", "--wait", "-q")
    run_id = done.stdout.strip()
    assert home.show(run_id)["status"] == "succeeded"
    # Of so small a model nearly all memory is the process's, of which a warm one has more.
    assert abs(home.show(run_id)["planned"]["compared"]["peak memory"]["error"]) < 0.35
    # Another daemon of the same home gets an error, and changes nothing.
    assert "running already" in home.run("daemon", "--drain", check=1).stderr
    until(lambda: is_mirrored(home.path / "mlflow.db"), "MLflow does not hear of the run's end")
    home.run("daemon", "--stop")
    assert daemon.wait(timeout=PATIENCE) == 0

    log = {e["payload"]["step"]: e["payload"]["loss"] for e in home.events(run_id, "StepCompleted")}
    assert list(log) == list(range(1, 13))
    engine = sa.create_engine(home.env["MLFLOW_TRACKING_URI"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step"))
        assert {row.step: row.value for row in rows} == log
        statuses = list(connection.execute(sa.text("SELECT name, status FROM runs")))
    assert statuses == [(f"first {run_id}", "FINISHED")]
    published = [e["payload"]["step"] for e in home.events(run_id, "CheckpointPublished")]
    assert published == [5, 10, 12]
    validated = [e["payload"]["step"] for e in home.events(run_id, "ValidationCompleted")]
    assert validated == [0, 12]
    samples = parse((home.path / "home" / "metrics.prom").read_text())
    assert samples["sftd_daemon_info"]
    assert samples["sftd_devices"][(("kind", "gpu"),)] == 0
    said = [json.loads(line) for line in (home.path / "daemon.log").read_text().splitlines()]
    started, ended = [x["message"] for x in said if (x["run_id"], x["attempt"]) == (run_id, 1)]
    assert started.startswith("attempt 1 started from the pretrained model, pid ")
    assert ended == "attempt 1 ended, run is succeeded"
    # Nothing of it is for other eyes.
    for path in (home.path / "home").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (home.path / "mlflow.db").stat().st_mode & 0o077 == 0
    assert_secrets_are_nowhere(home)


def test_submit_wait_fails_when_the_run_does(home: Home) -> None:
    # The submit is right when it is made; the file is another by the time it is read.
    with subprocess.Popen(
        home.command("submit", str(home.config), "--wait", "-q"),
        env=home.env,
        cwd=home.path,
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        run_id = waiting.stdout.readline().strip()
        write_rows(home.path / "train.parquet", 64, seed=9)
        daemon = home.start_daemon()
        assert waiting.wait(timeout=PATIENCE) == 1
    daemon.terminate()
    daemon.wait(timeout=PATIENCE)
    shown = home.show(run_id)
    assert shown["cause"] == "user error"
    assert "changed since the run was submitted" in shown["message"]


def test_on_postgresql(home: Home, postgres_url: str) -> None:
    # The server trusts every client of its socket; a password is passed on all the same.
    url = sa.make_url(postgres_url).set(password=SECRET).render_as_string(hide_password=False)
    assert SECRET in url
    home.env["SFTD_DATABASE_URL"] = url
    refused = home.run("ls", check=2)
    assert "sftd init" in refused.stderr
    home.run("init")
    run_id = home.submit("trainer.max_steps=60", "trainer.save_interval=20")
    home.hold_at(run_id, 25)
    daemon = home.start_daemon("--drain")
    home.held(run_id)
    home.kill_ranks(run_id)
    home.wait(run_id, "succeeded")
    assert daemon.wait(timeout=PATIENCE) == 0
    shown = home.show(run_id)
    assert shown["anomalies"] == 0
    assert shown["steps_redone"] > 0
    before = view_rows(url)
    home.run("views", "rebuild")
    assert view_rows(url) == before
    assert SECRET not in refused.stderr
    assert_no_row_holds_the_secret(postgres_url)
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def assert_no_row_holds_the_secret(url: str) -> None:
    """Every row of every table, as text."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        assert "events" in tables
        for table in tables:
            rows = connection.execute(sa.text(f'SELECT t::text FROM "{table}" t')).scalars().all()
            assert [row for row in rows if SECRET in row] == []


def test_the_model_learns_from_the_command_line(home: Home) -> None:
    """`logs`, `events` and `ls` say what happened, in words and in JSON."""
    run_id = home.submit("optimizer.lr=0.01", "trainer.max_steps=20")
    home.drain()
    losses = [e["payload"]["loss"] for e in home.events(run_id, "StepCompleted")]
    assert losses[-1] < losses[0]
    assert run_id in home.run("ls").stdout
    assert "succeeded" in home.run("ls", "-s", "succeeded").stdout
    assert json.loads(home.run("ls", "-s", "failed", "--json").stdout) == []
    text = home.run("events", run_id[:6]).stdout
    assert "CheckpointPublished" in text
    assert "RunSucceeded" in text
    progress = home.run("logs", run_id).stdout
    assert progress.count("  grad ") == 20
    assert "[attempt 1] step 20/20  loss " in progress
    assert home.run("logs", run_id, "--tail", "1").stdout.count("[attempt 1] step") == 1
    assert "checkpoint" in home.run("show", run_id).stdout
    # Its config may be submitted again, and is the same.
    again = home.path / "again.yaml"
    again.write_text(home.run("show", run_id, "--config").stdout)
    digest = json.loads(home.run("submit", str(again), "--json").stdout)["spec_digest"]
    assert digest == home.show(run_id)["spec_digest"]
    assert Path(home.show(run_id)["checkpoints"][-1]["path"]).is_dir()
    compared = home.show(run_id)["planned"]["compared"]
    assert abs(compared["checkpoint"]["error"]) < 0.35
    assert compared["whole run"]["actual"] > compared["step"]["actual"] > 0
    assert "peak memory" in home.run("show", run_id).stdout
    # The next plan knows the pace.
    assert json.loads(home.run("plan", str(home.config), "--json").stdout)["pace"]["basis"] == "log"
    assert os.environ.get("SFTD_HOME") != home.env["SFTD_HOME"]


def test_a_run_too_large_for_the_machine_waits_and_says_so(home: Home) -> None:
    home.env["SFTD_CPU_SLOTS"] = "1"
    large = home.submit("launch.device=cuda", "launch.nproc_per_node=2")
    small = home.submit("trainer.max_steps=2")
    log = home.drain()
    assert f"{large}: needs 2 cuda devices, more than this host has" in log
    assert home.show(large)["status"] == "queued"
    assert home.show(small)["status"] == "succeeded"
