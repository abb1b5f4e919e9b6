"""Processes of an attempt on this host, with `sleep` in torchrun's place."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sftd.domain.run.failures import classify
from sftd.domain.spec.spec import Spec
from sftd.launcher import device_holds, local, processes, rerun
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.launcher.inventory import Inventory, Need
from sftd.launcher.local import LocalAttempt
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders.patience import PATIENCE, until

NEED = Need("cpu", 1, 1)


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Order]:
    """An order under a token of its own; whatever was started under it is killed at the end."""
    monkeypatch.setattr(local, "torchrun_argv", lambda spec, directory: ["sleep", "600"])
    token = f"token-of-{tmp_path}"
    yield Order(
        run_id="run",
        attempt=1,
        token=token,
        spec=Spec(),
        planned_steps=1,
        checkpoint_dir=str(tmp_path / "checkpoints"),
    )
    processes.kill(processes.survivors(token))


def test_started_found_again_and_killed(tmp_path: Path, order: Order) -> None:
    directory = AttemptDir(tmp_path / "attempt")
    attempt, _ = LocalAttempt.start(directory, order, NEED, ["cpu:0"])
    assert attempt.is_alive()
    again = LocalAttempt.adopt(directory, "unused")
    assert again.is_alive()
    assert again.process is not None
    assert again.process.devices == ["cpu:0"]
    assert attempt.kill() == []
    assert not attempt.is_alive()
    assert not again.is_alive()
    assert again.remains().exit_code is None


def test_a_clock_that_was_set_does_not_make_it_dead(tmp_path: Path, order: Order) -> None:
    """Create times count from the wall clock; the token in the processes' environment does not."""
    directory = AttemptDir(tmp_path / "attempt")
    attempt, _ = LocalAttempt.start(directory, order, NEED, [])
    assert attempt.process is not None
    directory.write_process(
        msgspec.structs.replace(attempt.process, create_time=attempt.process.create_time - 3600)
    )
    assert LocalAttempt.adopt(directory, "unused").is_alive()
    assert attempt.kill() == []


def test_nothing_lives_on_when_the_start_fails_halfway(
    tmp_path: Path, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk after the start: the caller learns that nothing was started, so nothing may have been."""

    def full(self: AttemptDir, process: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AttemptDir, "write_process", full)
    with pytest.raises(OSError, match="No space left"):
        LocalAttempt.start(AttemptDir(tmp_path / "attempt"), order, NEED, [])
    assert processes.survivors(order.token) == []


@pytest.mark.parametrize(("script", "expected"), [("exit 3", 3), ("kill -9 $PPID", None)])
def test_an_exit_code_that_the_full_disk_did_not_take_is_told_by_the_process(
    tmp_path: Path, order: Order, monkeypatch: pytest.MonkeyPatch, script: str, expected: int | None
) -> None:
    """Else the attempt would be called lost, which is what one is whose host went down."""
    directory = AttemptDir(tmp_path / "attempt")
    # In its place nothing can be written.
    directory.exit_file.with_name("exit.partial").mkdir(parents=True)
    monkeypatch.setattr(local, "torchrun_argv", lambda *_: ["/bin/sh", "-c", script])
    attempt, _ = LocalAttempt.start(directory, order, NEED, [])
    assert attempt._child is not None
    attempt._child.wait(timeout=30)
    assert not attempt.is_alive()
    attempt.kill()
    assert (directory.exit_code(), attempt.remains().exit_code) == (None, expected)


def test_one_that_was_killed_has_no_exit_code(tmp_path: Path, order: Order) -> None:
    """A wait for the killed processes reaps the child, too, and Popen then reports 0, which no process returned."""
    attempt, _ = LocalAttempt.start(AttemptDir(tmp_path / "attempt"), order, NEED, [])
    while not processes.survivors(order.token):
        pass
    attempt.kill()
    assert not attempt.is_alive()
    assert attempt.remains().exit_code is None


@pytest.mark.parametrize(("blocks", "files"), [(0, 9), (9, 0)])
def test_a_full_disk_is_told_although_it_took_no_word_of_it(
    tmp_path: Path, order: Order, monkeypatch: pytest.MonkeyPatch, blocks: int, files: int
) -> None:
    directory = AttemptDir(tmp_path / "attempt")
    monkeypatch.setattr(local, "torchrun_argv", lambda *_: ["/bin/sh", "-c", "exit 1"])
    attempt, _ = LocalAttempt.start(directory, order, NEED, [])
    assert attempt._child is not None
    attempt._child.wait(timeout=30)
    assert classify(attempt.remains()).cause != "disk full"
    real = os.statvfs(tmp_path)
    full = SimpleNamespace(f_frsize=real.f_frsize, f_bavail=blocks * 2**20, f_files=10, f_favail=files)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    failure = classify(attempt.remains())
    assert failure.cause == "disk full"
    assert "No space left on device" in failure.message
    # What a rank could still say counts for more.
    directory.write_rank_error(0, '{"message": "ValueError: no"}')
    assert classify(attempt.remains()).cause == "crash"


def test_an_identity_file_cut_short_is_no_identity(tmp_path: Path, order: Order) -> None:
    directory = AttemptDir(tmp_path / "attempt")
    directory.create(order)
    directory.process_file.write_text('{"pid": 12')
    assert directory.process() is None
    assert not LocalAttempt.adopt(directory, "unused").is_alive()


def test_devices_are_never_given_twice() -> None:
    inventory = Inventory(gpus=2, cpu_slots=4)
    spec = Spec()
    assert inventory.need(spec) == Need("cuda", 1, 2)
    _, first = inventory.take("a", spec)
    inventory.restore("b", ["cuda:1"])
    assert (first, inventory.fits(spec)) == (["cuda:0"], False)
    inventory.release("a")
    assert inventory.fits(spec) is True
    large = msgspec.structs.replace(spec, launch=msgspec.structs.replace(spec.launch, nproc_per_node=3))
    assert inventory.fits(large) is None


def test_torchrun_holds_its_lock_for_as_long_as_it_lives(tmp_path: Path, order: Order) -> None:
    """Where its pid is not to be seen, as from another container, the lock shows whether it lives."""
    directory = AttemptDir(tmp_path / "attempt")
    assert directory.is_held_alive() is None
    attempt, _ = LocalAttempt.start(directory, order, NEED, [])
    assert directory.is_held_alive() is True
    attempt.kill()
    assert directory.is_held_alive() is False


def test_what_is_tied_to_its_owner_ends_with_it_and_tells_its_exit_code(
    tmp_path: Path, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifeline, end = os.pipe()
    directory = AttemptDir(tmp_path / "attempt")
    attempt, _ = LocalAttempt.start(directory, order, NEED, [], lifeline=lifeline)
    os.close(lifeline)
    assert attempt.is_alive()
    # As the kernel does for who is killed.
    os.close(end)
    assert attempt._child is not None
    attempt._child.wait(timeout=PATIENCE)
    assert processes.survivors(order.token) == []
    assert attempt.remains().exit_code == 137

    monkeypatch.setattr(local, "torchrun_argv", lambda *_: ["/bin/sh", "-c", "exit 7"])
    lifeline, end = os.pipe()
    directory = AttemptDir(tmp_path / "second")
    attempt, _ = LocalAttempt.start(directory, order, NEED, [], lifeline=lifeline)
    os.close(lifeline)
    assert attempt._child is not None
    attempt._child.wait(timeout=PATIENCE)
    os.close(end)
    assert attempt.remains().exit_code == 7
    until(lambda: processes.survivors(order.token) == [])


def test_a_device_is_held_until_what_computes_on_it_has_ended(tmp_path: Path, order: Order) -> None:
    with device_holds.holding(tmp_path, ["cuda:0"]) as holds:
        attempt, _ = LocalAttempt.start(AttemptDir(tmp_path / "attempt"), order, NEED, [], inherited=holds)
    assert device_holds.held(tmp_path) == {"cuda:0"}
    attempt.kill()
    assert device_holds.held(tmp_path) == set()


def test_a_scratch_folder_is_swept_once_its_command_was_killed(tmp_path: Path, order: Order) -> None:
    with rerun.rerun(order, NEED, [], tmp_path) as scratch:
        assert rerun.sweep(tmp_path) == [], "its command lives"
        killed = tmp_path / "copy"
        shutil.copytree(scratch.folder.parent, killed)
    assert not rerun.scratch_folder(tmp_path).exists()
    with rerun.rerun(order, NEED, [], tmp_path, keep=True):
        pass
    rerun.scratch_folder(tmp_path).mkdir(exist_ok=True)
    killed = killed.rename(rerun.scratch_folder(tmp_path) / "killed")
    left = AttemptDir(killed / "attempt").order().token
    env = {TOKEN_VARIABLE: left, "PATH": os.environ["PATH"]}
    with subprocess.Popen(["sleep", "600"], env=env, start_new_session=True) as stray:
        assert rerun.abandoned(tmp_path) == [killed]
        assert rerun.sweep(tmp_path) == [killed]
        stray.wait(timeout=PATIENCE)
    (kept,) = rerun.scratch_folder(tmp_path).iterdir()
    assert kept != killed
