"""GPUs of this host that a command uses beside the daemon: one lock file per GPU. The lock ends with the command and its child
processes.

`sftd verify` has no lease, so the daemon needs these locks to leave its GPUs alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from sftd.wire.attempt.directory import make_private

_FOLDER = "devices"


def held(home: Path) -> set[str]:
    """The devices that a process holds."""
    try:
        names = os.listdir(home / _FOLDER)
    except FileNotFoundError:
        return set()
    return {unquote(name) for name in names if _is_locked(home / _FOLDER / name)}


@contextlib.contextmanager
def holding(home: Path, devices: Iterable[str]) -> Iterator[list[int]]:
    """Hold devices until the block ends and all processes that inherit the yielded descriptors have ended. Several commands may
    hold the same device: users can name one explicitly."""
    make_private(home / _FOLDER)
    held_by: list[int] = []
    with contextlib.ExitStack() as stack:
        for device in devices:
            path = home / _FOLDER / quote(device, safe=":")
            file = stack.enter_context(open(path, "w", opener=_private))
            fcntl.flock(file, fcntl.LOCK_SH)
            held_by.append(file.fileno())
        yield held_by


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
