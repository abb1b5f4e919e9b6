"""One daemon per home: a living daemon holds a lock on `daemon.lock`, which the kernel releases however the daemon ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from sftd.domain.errors import SftdError

# Longer than a probe holds the lock, and longer than a starting daemon needs to write its pid.
_PROBE_SECONDS = 1.0


class AlreadyRunning(SftdError):
    """A daemon of this home is running already."""


class DaemonLock:
    """Holds the lock while entered. The file contains the holder's pid, for users and for `sftd daemon --stop`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def __enter__(self) -> DaemonLock:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # `holder` takes a shared lock for an instant, so one failure does not prove that a daemon runs.
        deadline = time.monotonic() + _PROBE_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                os.close(fd)
                raise AlreadyRunning(
                    f"A daemon of this home is running already (pid {holder(self._path)})."
                ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._fd is not None
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def holder(path: Path) -> int | None:
    """Pid of the daemon that holds the lock; None if there is none. Raises `SftdError` if the lock file has no pid."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    deadline = time.monotonic() + _PROBE_SECONDS
    try:
        while True:
            try:
                # Shared: two concurrent probes must not take each other for the daemon.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                text = os.pread(fd, 32, 0).decode().strip()
            if text.isdigit() and int(text) >= 1:
                return int(text)
            # The daemon is starting or ending.
            if time.monotonic() > deadline:
                raise SftdError(f"{path} is locked, but contains no pid")
            time.sleep(0.02)
    finally:
        os.close(fd)
