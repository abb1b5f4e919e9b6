"""A daemon and its database: one that starts later, and one that a stopped daemon keeps locked."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.store.database import engine
from tests.builders.process.homes import Home


def test_a_daemon_waits_for_its_database(home: Home, database_url: str, tmp_path: Path) -> None:
    url = sa.make_url(database_url)
    if url.get_backend_name() == "sqlite":
        pytest.skip("a file is there or is made")
    # The socket of a server that has not started yet: it is there once the link is. Its path may have 107 bytes.
    link = Path(f"{url.query['host']}-late")
    env = home.env | {
        "SFTD_DATABASE_URL": url.update_query_dict({"host": str(link)}).render_as_string(hide_password=False)
    }
    argv = [sys.executable, "-m", "sftd", "daemon"]
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        try:
            said = daemon.stderr.readline()
            assert "does not answer" in said, said
            assert said.rstrip().endswith("trying again")
            link.symlink_to(str(url.query["host"]))
            said = daemon.stderr.readline()
            assert "on 2 cpu" in said, said
        finally:
            link.unlink(missing_ok=True)
            daemon.terminate()
        daemon.stderr.read()
    assert daemon.returncode == 0


def test_a_daemon_asked_to_stop_while_it_waits_ends(home: Home, tmp_path: Path) -> None:
    env = home.env | {"SFTD_DATABASE_URL": f"postgresql://nobody@/none?host={tmp_path}"}
    argv = [sys.executable, "-m", "sftd", "daemon"]
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        assert "does not answer" in daemon.stderr.readline()
        daemon.terminate()
        assert daemon.stderr.read() == ""
    assert daemon.returncode == 0


def test_what_waiting_does_not_fix_is_told_at_once(home: Home) -> None:
    env = home.env | {"SFTD_DATABASE_URL": "no url"}
    argv = [sys.executable, "-m", "sftd", "daemon"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert (done.returncode, "is not a database URL" in done.stderr) == (1, True)


def test_a_file_that_a_stopped_daemon_locks_says_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BUSY_SECONDS", 0.1)
    folder = Path(home.env["SFTD_HOME"])
    assert CliRunner().invoke(main, ["init"], env=home.env).exit_code == 0
    holding = (
        "import os, pathlib, signal, sys; from sftd.daemon.lock import DaemonLock; "
        "DaemonLock(pathlib.Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    argv = [sys.executable, "-c", holding, str(folder / "daemon.lock")]
    with subprocess.Popen(argv) as daemon:
        try:
            assert os.WIFSTOPPED(os.waitpid(daemon.pid, os.WUNTRACED)[1])
            writer = sqlite3.connect(folder / "sftd.db", isolation_level=None)
            writer.execute("BEGIN IMMEDIATE")
            done = CliRunner().invoke(main, ["submit", str(home.config)], env=home.env)
            writer.close()
        finally:
            daemon.send_signal(signal.SIGKILL)
    assert done.exit_code == 1
    assert "database is locked" in done.stderr
    assert f"`kill -CONT {daemon.pid}`" in done.stderr
