"""What every launcher promises (`sftd.launcher.seam`), with a shell script in torchrun's place: real processes, real kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sftd.domain.spec.spec import Spec
from sftd.launcher import local, processes
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.launcher.seam import Attempt, Launcher, Report
from sftd.launcher.slurm import script as slurm_script
from sftd.launcher.slurm.attempt import SlurmLauncher
from sftd.launcher.slurm.controller import Controller
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders.patience import until
from tests.builders.process.slurm_cluster import SlurmCluster

# Each sleep is a step; at its end a trainer looks whether it is to stop.
UNTIL_STOPPED = "while [ ! -e stop ]; do sleep 0.02; done; exit 3"
FOR_EVER = "(setsid sleep 600 &) ; sleep 600 & touch runs; wait"


@pytest.fixture(params=["local", "slurm"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    if request.param == "local":
        yield LocalAttempt
        return
    request.getfixturevalue("slurm")
    controller = Controller(poll_seconds=0.2)
    yield SlurmLauncher(controller)
    controller.stop()


@pytest.fixture
def directory(tmp_path: Path) -> AttemptDir:
    return AttemptDir(tmp_path / "attempt")


@pytest.fixture
def start(
    launcher: Launcher, directory: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Attempt]]:
    """Start an attempt whose torchrun is this script. Whatever lives at the end is killed."""
    token = f"token-of-{directory.path}"

    def begin(script: str) -> Attempt:
        for module, name in ((local, "torchrun_argv"), (slurm_script, "argv")):
            monkeypatch.setattr(module, name, lambda spec, folder: ["bash", "-c", script])
        order = Order(
            run_id="run",
            attempt=1,
            token=token,
            spec=Spec(),
            planned_steps=1,
            checkpoint_dir=str(directory.path / "checkpoints"),
        )
        attempt, argv = launcher.start(directory, order, Need("cpu", 1, 1), ["cpu:0"])
        assert argv == ["bash", "-c", script]
        return attempt

    yield begin
    processes.kill(processes.survivors(token))


def wait(attempt: Attempt) -> None:
    """Until it is gone."""
    until(lambda: not attempt.is_alive())


def test_an_attempt_ends_with_its_exit_code_and_its_output(
    start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    attempt = start("echo to stdout; echo to stderr >&2; exit 7")
    wait(attempt)
    assert attempt.remains().exit_code == 7
    assert set(directory.output_log.read_text().split("\n")) >= {"to stdout", "to stderr"}
    assert directory.output_log.stat().st_mode & 0o077 == 0


def test_a_stop_is_asked_for_through_the_folder(
    start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    attempt = start(UNTIL_STOPPED)
    assert attempt.is_alive()
    directory.request_stop()
    wait(attempt)
    assert attempt.remains().exit_code == 3


def test_another_daemon_finds_it_alive_sees_it_end_and_knows_its_devices(
    launcher: Launcher, start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    first = start(UNTIL_STOPPED)
    again = launcher.adopt(directory, "unused")
    assert again.is_alive()
    assert again.process is not None
    assert again.process.devices == ["cpu:0"]
    directory.request_stop()
    wait(first)
    assert not again.is_alive()
    assert again.remains().exit_code == 3


def test_a_kill_leaves_no_process_whoever_does_it(
    launcher: Launcher, start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    attempt = start(FOR_EVER)
    until((directory.path / "runs").exists)
    again = launcher.adopt(directory, "unused")
    until(lambda: again.kill() == [])
    assert not again.is_alive()
    until(lambda: not attempt.is_alive())
    assert attempt.kill() == [], "killing the dead is nothing"
    assert processes.survivors(directory.order().token) == []
    assert attempt.remains().exit_code != 0
    assert attempt.stacks() == []


def test_a_kill_holds_though_it_cannot_be_done_now(
    request: pytest.FixtureRequest, launcher: Launcher, start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    """It is asked for once; where another program does it, that one is away when it is asked."""
    attempt = start(FOR_EVER)
    until((directory.path / "runs").exists)
    if isinstance(launcher, SlurmLauncher):
        slurm: SlurmCluster = request.getfixturevalue("slurm")
        slurm.stop_controller()
        try:
            assert attempt.kill()
            until(lambda: "not cancelled yet" in (attempt.report() or Report("", "")).reason)
        finally:
            slurm.start_controller()
    else:
        attempt.kill()
    until(lambda: not attempt.is_alive())
    until(lambda: processes.survivors(directory.order().token) == [])


def test_what_was_never_started_is_dead(launcher: Launcher, directory: AttemptDir) -> None:
    found = launcher.adopt(directory, "some-token")
    assert not found.is_alive()
    assert found.kill() == []
    assert found.remains().exit_code is None


def test_the_trainer_gets_its_token_and_no_secret(
    start: Callable[[str], Attempt], directory: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_DATABASE_URL", "postgresql://me:hush@host/db")
    wait(start("env"))
    told = directory.output_log.read_text()
    assert f"{TOKEN_VARIABLE}={directory.order().token}" in told
    assert "hush" not in told
