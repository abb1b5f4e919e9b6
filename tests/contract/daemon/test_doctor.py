"""What `sftd doctor` says of databases, MLflow servers, daemons and the leftovers of dead attempts."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.cli.doctor import host as doctor_host
from sftd.cli.doctor import services as doctor_services
from sftd.daemon.lock import DaemonLock
from sftd.domain.finding import Finding
from sftd.domain.spec.spec import Spec
from sftd.launcher import processes
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.projections.mirrors.mlflow.mirror import Mlflow
from sftd.settings import Settings, read
from sftd.store.database.engine import Store
from sftd.store.queue import daemons, leases
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders import json_fields

SECRET = "hush-hush-9"


def settings(home: Path, **more: str) -> Settings:
    home.mkdir(mode=0o700, exist_ok=True)
    return read({"SFTD_HOME": str(home), "MLFLOW_TRACKING_URI": "", **more})


def only(found: Any) -> Finding:
    [one] = found
    return one


def test_a_database_in_order(database_url: str, tmp_path: Path) -> None:
    store, found = doctor_services.database(settings(tmp_path / "home", SFTD_DATABASE_URL=database_url))
    assert store is not None
    store.engine.dispose()
    assert only(found).state == "ok"
    assert "revision" in only(found).said
    if database_url.startswith("postgresql"):
        assert "clocks" in only(found).said


def test_a_database_without_tables(empty_database_url: str, tmp_path: Path) -> None:
    """A SQLite file is created where it is needed; a person creates a server's tables. A look creates neither."""
    _, found = doctor_services.database(settings(tmp_path / "home", SFTD_DATABASE_URL=empty_database_url))
    one = only(found)
    if empty_database_url.startswith("sqlite"):
        assert (one.state, Path(sa.make_url(empty_database_url).database or "").exists()) == ("ok", False)
    else:
        assert (one.state, one.fix) == ("broken", "run `sftd init`")


def test_a_server_whose_clock_is_off(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite has no clock of its own")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 30)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + 300) * 1e9))
    began = time.monotonic()
    store, found = doctor_services.database(settings(tmp_path / "home", SFTD_DATABASE_URL=database_url))
    took = time.monotonic() - began
    assert store is not None
    assert only(found).state == "warning"
    (off,) = re.findall(r"its clock is (\S+) s off this host's", only(found).said)
    # No better than the server's answer was quick.
    assert float(off) == pytest.approx(-30.0, abs=0.1 + took)
    assert "the queue uses the server's clock" in only(found).fix
    lease(store, tmp_path / "home", "elsewhere", seen_at=int(real() * 1e6))
    found = list(doctor_services.daemon(settings(tmp_path / "home"), store))
    assert [f.said for f in found if "silent" in f.said] == [], "a daemon that was seen just now"
    store.engine.dispose()


def test_the_command_says_what_is_broken_without_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: dict[str, Any]
) -> None:
    """The whole command, with the real torch in a process of its own."""
    monkeypatch.setenv("SFTD_DATABASE_URL", f"postgresql://ada:{SECRET}@127.0.0.1:1/none?password={SECRET}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:{SECRET}@127.0.0.1:1")
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 1
    found = {f["check"]: f for f in json.loads(done.stdout)}
    json_fields.check("doctor", found["torch"])
    states = {check: f["state"] for check, f in found.items()}
    assert states["database"] == "broken"
    assert states["MLflow"] == "warning"
    assert {states[check] for check in ("Python", "torch", "ports", "home")} == {"ok"}
    assert "Megatron-core" in found["torch"]["said"]
    assert all(f["fix"] for f in found.values() if f["state"] != "ok")
    assert SECRET not in done.output


def test_at_eighty_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sftd.cli.doctor import command as doctor
    from sftd.domain import finding as findings

    monkeypatch.setenv("COLUMNS", "80")
    long = "a sentence that is longer than what is left of a line of eighty columns, and goes on"
    doctor._print([findings.ok("shared memory", long), findings.broken("disk", "full", f"{long} [{long}]")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "1 ok, 0 warnings, 1 broken"
    assert any("fix: a sentence" in line for line in lines)


@contextmanager
def server(version: str) -> Iterator[str]:
    """An HTTP server that gives this version, and nothing without the password."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization", "").startswith("Basic ")
            self.send_response(200 if allowed and self.path == "/version" else 401)
            self.end_headers()
            self.wfile.write(version.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


def test_an_mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    with server(version("mlflow")) as url:
        mine = settings(tmp_path, MLFLOW_TRACKING_URI=url)
        assert "401" in only(Mlflow().check(mine)).said
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        assert only(Mlflow().check(mine)).state == "ok"
    with server("1.30.0") as url:
        assert "is version 1.30.0" in only(Mlflow().check(settings(tmp_path, MLFLOW_TRACKING_URI=url))).said
    assert only(Mlflow().check(settings(tmp_path, MLFLOW_TRACKING_URI="somewhere"))).state == "broken"
    assert only(Mlflow().check(settings(tmp_path))).said.startswith("the mirror is off")


def test_mlflow_in_a_database(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    mine = settings(tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{file}")
    assert "will be made" in only(Mlflow().check(mine)).said
    assert not file.exists()
    file.write_text("this is no database at all, not even a small one" * 100)
    found = only(Mlflow().check(mine))
    assert (found.state, "not a database" in found.said) == ("warning", True)


def lease(store: Store, home: Path, host: str, seen_at: int) -> None:
    row = DaemonRow("old", host, 1, 1.0, str(home), "{}", started_at=1, seen_at=seen_at)
    with store.write(appends=False) as tx:
        daemons.register(tx, row)
        tx.execute(sa.text("UPDATE daemons SET seen_at = :at"), {"at": seen_at})
        leases.enqueue(tx, "run-a", 0, 0)
        leases.lease(tx, "run-a", 2, "token", "old", 0)


def test_a_daemon_that_is_gone_is_named(store: Store, tmp_path: Path) -> None:
    mine = settings(tmp_path / "home")
    none, *_ = doctor_services.daemon(mine, None)
    assert (none.state, "sftd daemon --detach" in none.fix) == ("warning", True)
    lease(store, mine.home, "elsewhere", seen_at=1_000_000)
    _, gone = doctor_services.daemon(mine, store)
    assert "run-a is driven by old, silent for" in gone.said
    assert "start its daemon again on elsewhere" in gone.fix
    with store.write(appends=False) as tx:
        tx.execute(sa.text("UPDATE daemons SET host = :host"), {"host": processes.host_name()})
    _, gone = doctor_services.daemon(mine, store)
    assert gone.fix == "start a daemon: it takes the run over"
    with DaemonLock(mine.daemon_lock):
        assert only(doctor_services.daemon(mine, store)).said.startswith(f"runs, pid {os.getpid()}")


def test_a_daemon_that_cannot_be_told_from_this_one_is_reported(store: Store, tmp_path: Path) -> None:
    mine = settings(tmp_path / "home")
    now = time.time_ns() // 1000
    row = DaemonRow("twin", processes.host_name(), 1, 1.0, str(mine.home), "{}", now, now)
    row = msgspec.structs.replace(row, boot_id="another", pid_namespace="1", home_id="1:1")
    with store.write(appends=False) as tx:
        daemons.register(tx, row)
        leases.enqueue(tx, "run-a", 0, 0)
        leases.lease(tx, "run-a", 2, "token", "twin", 0)
    _, twin = doctor_services.daemon(mine, store)
    assert (twin.state, twin.said.split()[0]) == ("broken", "twin")
    assert "docker run --hostname" in twin.fix
    with store.write(appends=False) as tx:
        tx.execute(sa.text("UPDATE daemons SET seen_at = 1"))
    _, gone = doctor_services.daemon(mine, store)
    assert "which ran in another container" in gone.said
    assert "sftd cancel run-a --abandon" in gone.fix


def test_what_dead_attempts_left_is_found(store: Store, tmp_path: Path) -> None:
    mine = settings(tmp_path / "my home")
    assert only(doctor_services.leftovers(mine, store)).state == "ok"
    lease(store, mine.home, "host", 1)  # drives attempt 2 of run-a
    order = Order(run_id="r", attempt=1, token="t", spec=Spec(), planned_steps=1, checkpoint_dir="c")
    children = []
    for attempt in ("attempt-0001", "attempt-0002"):
        directory = AttemptDir(mine.home / "runs" / "run-a" / attempt)
        directory.create(order)
        env = {TOKEN_VARIABLE: f"doctor {tmp_path}", "PATH": os.environ["PATH"]}
        children.append(subprocess.Popen(["sleep", "600"], cwd=directory.path, env=env))
    for run_id in ("run-a", "run-b"):
        partial = mine.home / "runs" / run_id / "checkpoints" / "step-00000005.partial"
        partial.mkdir(parents=True)
        (partial / "weights").write_bytes(b"x" * 2000)
    try:
        process, files = doctor_services.leftovers(mine, store)
        assert (process.state, process.fix) == ("warning", f"kill -9 {children[0].pid}")
        assert files.said.startswith("1 half-written checkpoint of runs that no daemon drives, 2.0 kB")
        assert shlex.split(files.fix)[2:] == [
            str(mine.home / "runs" / "run-b" / "checkpoints" / "step-00000005.partial")
        ]
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = settings(tmp_path / "my home")
    assert next(iter(doctor_host.disk(mine))).state == "ok"
    assert list(mine.home.iterdir()) == []
    mine.home.chmod(0o755)
    assert next(doctor_host.disk(mine)).fix == f"chmod 700 '{mine.home}'"
    monkeypatch.setattr(doctor_host, "_NONE_BYTES", 2**60)
    assert list(doctor_host.disk(mine))[-1].state == "broken"
    monkeypatch.setattr(doctor_host, "_FILES", 2**40)
    monkeypatch.setattr(doctor_host, "_SHARED_BYTES", 2**60)
    assert [f.state for f in doctor_host.limits()] == ["warning", "warning"]
    assert only(doctor_host.ports()).state == "ok"
    monkeypatch.setattr(doctor_host.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("10.1.2.3", 0))])
    assert "localhost is 10.1.2.3" in only(doctor_host.ports()).said
    assert only(doctor_host.clock()).check == "clock"


def test_sqlite_belongs_on_a_local_disk_wherever_the_home_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster the home is on a file system that all nodes see, and the database is not."""
    home, local = tmp_path / "home", tmp_path / "local"
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(home), fstype="nfs4"),
    ]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)

    def said(**more: str) -> list[str]:
        return [f.said for f in doctor_host.disk(settings(home, **more)) if f.state == "broken"]

    (database,) = said()
    assert database == f"the database ({home}/sftd.db): SQLite is not safe on nfs4"
    there = {"SFTD_DATABASE_URL": f"sqlite:///{local}/sftd.db"}
    assert said(**there) == []
    (mlflow,) = said(**there, MLFLOW_TRACKING_URI=f"sqlite:///{home}/mlflow.db")
    assert mlflow.startswith("MLflow's database")
    assert said(**there, MLFLOW_TRACKING_URI=f"sqlite:///{local}/mlflow.db") == []


def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    found = only(doctor_host.trainer(None))
    assert (found.state, found.said) == ("broken", "ImportError: libcudart.so.13: cannot open")


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"torch": "2", "cuda": None, "megatron_core": "0", "gpus": 0, "nccl": None, "nccl_error": None}
    script = f"print({json.dumps(json.dumps(said))})"
    real = subprocess.run
    monkeypatch.setattr(
        doctor_host.subprocess, "run", lambda _, **options: real([sys.executable, "-c", script], **options)
    )
    _, nccl = doctor_host.trainer(8)
    assert (nccl.state, nccl.said) == ("broken", "torch sees 0 of 8 GPUs")
