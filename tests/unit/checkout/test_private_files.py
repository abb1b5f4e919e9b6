"""What sftd writes is its user's alone, whatever the umask allows: it holds paths, prompts, outputs and the leases' tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftd.cli import main
from sftd.daemon.lock import DaemonLock
from sftd.daemon.log import PrivateFile
from sftd.domain.log import events as e
from sftd.domain.spec.spec import Spec
from sftd.launcher import device_holds, local
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.wire.attempt.direct_run import DirectRun, DirectSubmission
from sftd.wire.attempt.directory import AttemptDir, Order, RunDir
from sftd.wire.attempt.journal import JournalWriter
from tests.builders.patience import PATIENCE


@pytest.fixture(autouse=True)
def everything_is_allowed() -> Iterator[None]:
    """A umask that keeps nobody out."""
    before = os.umask(0)
    yield
    os.umask(before)


def order(folder: Path) -> Order:
    return Order(
        run_id="run",
        attempt=1,
        token=f"token-of-{folder}",
        spec=Spec(),
        planned_steps=1,
        checkpoint_dir=str(folder / "checkpoints"),
    )


def modes(folder: Path) -> dict[str, str]:
    """Everything below a folder that others may use in any way."""
    return {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for path in folder.rglob("*")
        if path.stat().st_mode & 0o077
    }


def test_a_home_and_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("SFTD_HOME", str(home))
    for command in (["init"], ["ls"], ["db", "check"]):
        assert CliRunner().invoke(main, command).exit_code == 0
    with DaemonLock(home / "daemon.lock"), device_holds.holding(home, ["cuda:0"]):
        assert {path.name for path in home.iterdir()} >= {"sftd.db", "daemon.lock"}
        assert modes(tmp_path) == {}


def test_the_folder_of_an_attempt(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path / "home", "run").attempt(1)
    attempt.create(order(tmp_path), {"MY_SECRET": "hush-hush-9"})
    descriptor = attempt.hold_alive()
    attempt.write_lease("token")
    attempt.write_exit_code(0)
    attempt.write_rank_error(0, "{}")
    attempt.request_stop()
    attempt.fence()
    attempt.ask_for_stacks()
    journal = JournalWriter(attempt.journal)
    journal.append(e.CheckpointStarted(step=1))
    journal.close()
    assert sum(path.is_file() for path in attempt.path.rglob("*")) >= 9
    assert modes(tmp_path) == {}
    if descriptor is not None:
        os.close(descriptor)


def test_what_ranks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own files, too: a rank may write a cache or a core into its working directory."""
    script = "echo said; mkdir made; echo text > made/file"
    monkeypatch.setattr(local, "torchrun_argv", lambda *_: ["/bin/sh", "-c", script])
    attempt, _ = LocalAttempt.start(AttemptDir(tmp_path / "attempt"), order(tmp_path), Need("cpu", 1, 1), [])
    assert attempt._child is not None
    assert attempt._child.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "attempt" / "made" / "file").read_text() == "text\n"
    assert attempt.directory.output_log.read_text() == "said\n"
    assert modes(tmp_path) == {}


def test_the_log_of_a_daemon(tmp_path: Path) -> None:
    handler = PrivateFile(tmp_path / "daemon.log", size=100, kept=1)
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": f"line {number} {'x' * 50}"}))
    handler.close()
    assert {path.name for path in tmp_path.iterdir()} == {"daemon.log", "daemon.log.1"}
    assert modes(tmp_path) == {}


def test_a_run_without_a_daemon(tmp_path: Path) -> None:
    run = DirectRun(tmp_path / "out" / "run")
    attempt = run.attempt(1)
    attempt.create(order(tmp_path))
    submitted = e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=1, user="ada", data={}, model={}, sftd_version="0"
    )
    run.write_submission(DirectSubmission.of("brave-otter-0000", 1, submitted))
    # The folder above is the user's own choice.
    assert modes(run.path) == {}
