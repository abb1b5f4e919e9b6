"""Train recorded steps again in a scratch folder: the same torchrun command, with a journal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sftd.domain.errors import SftdError
from sftd.domain.log.events import Event
from sftd.domain.run.failures import classify
from sftd.launcher import processes
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.wire.attempt import journal
from sftd.wire.attempt.directory import AttemptDir, Order, make_private

_POLL_SECONDS = 0.1
_LOCK = "lock"


class RerunFailed(SftdError):
    """The steps could not be trained again."""


def scratch_folder(home: Path) -> Path:
    """The parent of a home's scratch folders."""
    return home / "verify"


@contextlib.contextmanager
def rerun(
    order: Order,
    need: Need,
    devices: list[str],
    home: Path,
    *,
    inherited: Sequence[int] = (),
    keep: bool = False,
) -> Iterator[Rerun]:
    """Train up to `order.last_step` in a new scratch folder of `home`. When the block ends, with or without an error, the
    processes are gone, and so is the folder unless `keep`. If this process is killed, its training processes are killed too,
    and `sweep` removes the folder. torchrun inherits the descriptors `inherited`."""
    parent = scratch_folder(home)
    make_private(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{order.run_id}-", dir=parent))
    directory = AttemptDir(folder / "attempt")
    order = msgspec.structs.replace(
        order, token=str(uuid.uuid4()), checkpoint_dir=str(folder / "checkpoints")
    )
    attempt = None
    with contextlib.ExitStack() as stack:
        if not keep:
            stack.enter_context(_held(folder))
        lifeline, end = os.pipe()
        stack.callback(os.close, end)
        try:
            try:
                attempt, _ = LocalAttempt.start(
                    directory, order, need, devices, lifeline=lifeline, inherited=inherited
                )
            finally:
                os.close(lifeline)
            yield Rerun(attempt)
        finally:
            if attempt is not None:
                attempt.kill()
            if not keep:
                _remove(folder)


def abandoned(home: Path) -> list[Path]:
    """Scratch folders whose command was killed, without those that a user chose to keep."""
    return [path.parent for path in sorted(scratch_folder(home).glob(f"*/{_LOCK}")) if not _is_locked(path)]


def sweep(home: Path) -> list[Path]:
    """End the processes of killed commands, and remove their scratch folders. Returns the folders."""
    folders = abandoned(home)
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            processes.kill(processes.survivors(AttemptDir(folder / "attempt").order().token))
        _remove(folder)
    return folders


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Protect a folder from `sweep` while this process lives."""
    new = folder / f".{_LOCK}"
    with open(new, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Lock before renaming: `sweep` must never see the lock file unlocked.
        new.rename(folder / _LOCK)
        yield


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        # A missing file: its command has just removed the folder.
        return True
    return False


class Rerun:
    """Training in a scratch folder."""

    def __init__(self, attempt: LocalAttempt) -> None:
        self._attempt = attempt

    @property
    def folder(self) -> Path:
        """The attempt's folder."""
        return self._attempt.directory.path

    def events(self) -> Iterator[Event]:
        """The trainer's events as they are written. Raises `RerunFailed` if the trainer fails."""
        offset, number = 0, 1
        while True:
            # Checked before the read, so that the last read sees everything that was written.
            alive = self._attempt.is_alive()
            lines, offset = journal.read(self._attempt.directory.journal, offset, number)
            number += len(lines)
            yield from (line.event for line in lines)
            if lines:
                continue
            if not alive:
                break
            time.sleep(_POLL_SECONDS)
        remains = self._attempt.remains()
        if remains.exit_code != 0:
            failure = classify(remains)
            # The message is complete for these causes. The evidence only repeats it for each rank.
            is_plain = failure.cause in ("user error", "bad checkpoint")
            raise RerunFailed(
                f"The steps could not be trained again: {failure.cause}: {failure.message}"
                + "".join(f"\n    {line}" for line in ([] if is_plain else failure.evidence))
            )
