"""Daemons in containers that share a host name and the path of their home: real namespaces, real training."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sftd.launcher import processes
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home, at_step

UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def has_namespaces() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    )


if not has_namespaces():
    pytest.skip("this user may not make pid namespaces (unshare)", allow_module_level=True)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Iterator[Home]:
    made = Home(tmp_path, tiny_model)
    # A daemon renews its row every second.
    made.env["SFTD_LEASE_SECONDS"] = "3"
    (tmp_path / "home").mkdir(mode=0o700, exist_ok=True)
    yield made
    made.close()


@pytest.fixture
def container(home: Home) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command in a container: a pid namespace of its own, and `folder` at the path of the home. The container ends
    with the command unless it `stays`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, folder: Path | None = None, stays: bool = False) -> subprocess.Popen[str]:
        mount = f'mount --bind "{folder}" "$SFTD_HOME" && ' if folder else ""
        argv = [
            *UNSHARE,
            "sh",
            "-c",
            f'{mount}{"" if stays else "exec "}"$@"{"; exec sleep 3600" if stays else ""}',
            "sh",
            *home.command(*arguments),
        ]
        log = open(home.path / f"container-{len(started)}.log", "w")  # noqa: SIM115
        with log:
            started.append(
                subprocess.Popen(argv, env=home.env, cwd=home.path, stdout=log, stderr=log, text=True)
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def log_of(home: Home, number: int) -> str:
    return (home.path / f"container-{number}.log").read_text()


def held(home: Home, run_id: str) -> dict[int, psutil.Process]:
    """Wait until the attempt of a container is stopped at the step where it is held. Returns its ranks, by the pids of this side."""
    attempt = home.attempt(run_id)
    until(lambda: home.holds.is_held(attempt.path))
    return {rank: psutil.Process(pid) for rank, pid in processes.ranks(attempt.order().token).items()}


def adopted(home: Home, run_id: str) -> int:
    return len(home.events(run_id, "AttemptAdopted"))


@pytest.mark.parametrize("empty_database_url", ["postgres"], indirect=True)
def test_a_second_container_of_the_same_name_leaves_the_first_one_alone(
    home: Home, empty_database_url: str, container: Callable[..., subprocess.Popen[str]]
) -> None:
    """Two that run with the host's network: it took the other's attempts for dead, and killed healthy runs."""
    home.env["SFTD_DATABASE_URL"] = empty_database_url
    home.run("init")
    folders = [home.path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
    save_dir = home.path / "checkpoints"
    run_id = home.submit(f"checkpoint.save_dir={save_dir}")
    container("daemon", folder=folders[0])
    home.follow(run_id, at_step(1))
    second = container("daemon", folder=folders[1])
    assert second.wait(timeout=PATIENCE) == 1
    assert "has the same host name" in log_of(home, 1)
    assert "docker run --hostname" in log_of(home, 1)
    detached = container("daemon", "--detach", folder=folders[1])
    assert detached.wait(timeout=PATIENCE) == 1
    assert "has the same host name" in log_of(home, 2), "said where a person reads it"
    shown = home.wait(run_id, "succeeded")
    assert (shown["attempt"], adopted(home, run_id)) == (1, 0)


def test_a_restarted_container_continues_its_runs(
    home: Home, container: Callable[..., subprocess.Popen[str]]
) -> None:
    run_id = home.submit()
    home.hold_at(run_id, 7)
    first = container("daemon")
    held(home, run_id)
    # As `docker kill`: the kernel ends all that is in it.
    first.kill()
    first.wait()
    container("daemon", "--drain")
    shown = home.wait(run_id, "succeeded")
    assert (shown["attempt"], adopted(home, run_id)) == (2, 1)


def test_what_lives_on_in_another_container_is_not_taken_for_dead(
    home: Home, container: Callable[..., subprocess.Popen[str]]
) -> None:
    """The daemon alone is killed there; both containers have one home."""
    run_id = home.submit()
    home.hold_at(run_id, 7)
    first = container("daemon", stays=True)
    ranks = held(home, run_id)
    for process in psutil.Process(first.pid).children(recursive=True):
        if process.cmdline()[1:4] == ["-m", "sftd", "daemon"]:
            process.kill()
    container("daemon")
    until(lambda: "nothing here proves that its processes have ended" in log_of(home, 1))
    assert all(process.status() == psutil.STATUS_STOPPED for process in ranks.values())
    assert adopted(home, run_id) == 0
    first.send_signal(signal.SIGKILL)
    first.wait()
    shown = home.wait(run_id, "succeeded")
    assert (shown["attempt"], adopted(home, run_id)) == (2, 1)
