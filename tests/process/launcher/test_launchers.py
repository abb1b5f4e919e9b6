"""What every launcher promises (`sftd.launcher.seam`), with a shell script in torchrun's place: real processes, real kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sftd.domain.spec.launch.launchers import KINDS, kind_of
from sftd.domain.spec.sections import Launch
from sftd.domain.spec.spec import Spec
from sftd.launcher import local, processes
from sftd.launcher.choosing import LAUNCHERS, ByName
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.launcher.inventory import Need
from sftd.launcher.seam import Attempt, Launcher, Report
from sftd.launcher.slurm import script as slurm_script
from sftd.settings import read
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders.patience import until
from tests.builders.process import stub_launcher
from tests.builders.process.slurm_cluster import SlurmCluster

# Each sleep is a step; at its end a trainer looks whether it is to stop.
UNTIL_STOPPED = "while [ ! -e stop ]; do sleep 0.02; done; exit 3"
FOR_EVER = "(setsid sleep 600 &) ; sleep 600 & touch runs; wait"


@pytest.fixture(params=[*LAUNCHERS, stub_launcher.STUB.name])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each launcher that is registered, and one that only this test registers."""
    stub_launcher.register(monkeypatch)
    if request.param == "slurm":
        request.getfixturevalue("slurm")
    return str(request.param)


@pytest.fixture
def made(name: str, tmp_path: Path) -> Iterator[dict[str, Launcher]]:
    settings = read({"SFTD_HOME": str(tmp_path), "SFTD_SLURM_POLL_SECONDS": "0.2"})
    found = {kind: registered.make(settings) for kind, registered in LAUNCHERS.items()}
    yield found
    found["slurm"]._controller.stop()  # type: ignore[attr-defined]


@pytest.fixture
def launcher(made: dict[str, Launcher]) -> Launcher:
    """As a daemon has them: each attempt is its launcher's."""
    return ByName(made)


@pytest.fixture
def devices(name: str) -> list[str]:
    return ["cpu:0"] if kind_of(name).uses_host_devices else [f"{name}:0"]


@pytest.fixture
def directory(tmp_path: Path) -> AttemptDir:
    return AttemptDir(tmp_path / "attempt")


@pytest.fixture
def token(directory: AttemptDir) -> str:
    return f"token-of-{directory.path}"


@pytest.fixture
def start(
    name: str,
    launcher: Launcher,
    directory: AttemptDir,
    token: str,
    devices: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Attempt]]:
    """Start an attempt whose torchrun is this script. Processes that live at the end are killed."""

    def begin(script: str) -> Attempt:
        for module, argv in (
            (local, "torchrun_argv"),
            (stub_launcher, "torchrun_argv"),
            (slurm_script, "argv"),
        ):
            monkeypatch.setattr(module, argv, lambda spec, folder: ["bash", "-c", script])
        order = Order(
            run_id="run",
            attempt=1,
            token=token,
            spec=Spec(launch=Launch(launcher=name)),  # type: ignore[arg-type]
            planned_steps=1,
            checkpoint_dir=str(directory.path / "checkpoints"),
        )
        attempt, started = launcher.start(directory, order, Need(devices[0].partition(":")[0], 1, 1), devices)
        assert started == ["bash", "-c", script]
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
    launcher: Launcher, start: Callable[[str], Attempt], directory: AttemptDir, devices: list[str]
) -> None:
    first = start(UNTIL_STOPPED)
    again = launcher.adopt(directory, "unused")
    assert again.is_alive()
    assert again.process is not None
    assert again.process.devices == devices
    directory.request_stop()
    wait(first)
    assert not again.is_alive()
    assert again.remains().exit_code == 3


def test_a_kill_leaves_no_process_whoever_does_it(
    launcher: Launcher, start: Callable[[str], Attempt], directory: AttemptDir, token: str
) -> None:
    attempt = start(FOR_EVER)
    until((directory.path / "runs").exists)
    again = launcher.adopt(directory, "unused")
    until(lambda: again.kill() == [])
    assert not again.is_alive()
    until(lambda: not attempt.is_alive())
    assert attempt.kill() == [], "killing the dead is nothing"
    assert processes.survivors(token) == []
    assert attempt.remains().exit_code != 0
    assert attempt.stacks() == []


def test_a_kill_holds_though_it_cannot_be_done_now(
    request: pytest.FixtureRequest,
    name: str,
    start: Callable[[str], Attempt],
    directory: AttemptDir,
    token: str,
) -> None:
    """It is asked for once; where another program does it, that one is away when it is asked."""
    attempt = start(FOR_EVER)
    until((directory.path / "runs").exists)
    if name == "slurm":
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
    until(lambda: processes.survivors(token) == [])


def test_what_was_never_started_is_dead(name: str, made: dict[str, Launcher], directory: AttemptDir) -> None:
    found = made[name].adopt(directory, "some-token")
    assert not found.is_alive()
    assert found.kill() == []
    assert found.remains().exit_code is None


def test_the_trainer_gets_its_token_and_no_secret(
    start: Callable[[str], Attempt], directory: AttemptDir, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_DATABASE_URL", "postgresql://me:hush@host/db")
    wait(start("env"))
    told = directory.output_log.read_text()
    assert f"{TOKEN_VARIABLE}={token}" in told
    assert "hush" not in told


def test_a_resource_manager_reports_in_words_that_name_it(
    name: str, start: Callable[[str], Attempt], directory: AttemptDir
) -> None:
    attempt = start(UNTIL_STOPPED)
    kind = KINDS[name]

    def report_when_it_runs() -> Report | None:
        assert attempt.is_alive(), "as a daemon asks, before each report"
        return attempt.report()

    until(lambda: not kind.is_managed or getattr(report_when_it_runs(), "trains", False))
    report = attempt.report()
    assert (report is not None) == kind.is_managed
    if report is not None:
        assert kind.describe(report) == f"{kind.shown}: job {report.job} running"
    directory.request_stop()
    wait(attempt)
