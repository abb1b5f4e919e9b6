"""Recorded steps, trained again in a folder of their own: the same torchrun, another journal, nothing that stays."""

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
    """Where the scratch folders of a home are."""
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
    """Start what `order` says in a new scratch folder of `home`; `order.last_step` says where it ends. At the end of the block,
    however it comes, its processes are gone, and so is the folder unless `keep`. When this process is killed, its processes are
    killed with it, and `sweep` removes the folder. torchrun has the descriptors `inherited` while it lives."""
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
    """Scratch folders whose command was killed. One that a person asked to keep is not among them."""
    return [path.parent for path in sorted(scratch_folder(home).glob(f"*/{_LOCK}")) if not _is_locked(path)]


def sweep(home: Path) -> list[Path]:
    """End what lives on of commands that were killed, and remove their scratch folders. Returns the folders."""
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
    """Keep a folder from being swept for as long as this process lives."""
    new = folder / f".{_LOCK}"
    with open(new, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Found under its name only when it is locked.
        new.rename(folder / _LOCK)
        yield


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        # Not there: its command has removed it just now.
        return True
    return False


class Rerun:
    """Training in a scratch folder."""

    def __init__(self, attempt: LocalAttempt) -> None:
        self._attempt = attempt

    @property
    def folder(self) -> Path:
        """Where it happens."""
        return self._attempt.directory.path

    def events(self) -> Iterator[Event]:
        """What the trainer tells, as it comes. Raises `RerunFailed` when it ends with anything but success."""
        offset, number = 0, 1
        while True:
            # Asked first: what is written before the end is then read by this round.
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
            # What the message says in full would only be said again, once for each rank and line of the traceback.
            is_plain = failure.cause in ("user error", "bad checkpoint")
            raise RerunFailed(
                f"The steps could not be trained again: {failure.cause}: {failure.message}"
                + "".join(f"\n    {line}" for line in ([] if is_plain else failure.evidence))
            )
