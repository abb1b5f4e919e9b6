"""What a rank prints takes a bounded part of the disk: of a file that grows and grows, the beginning and the end are kept.

torchrun opens the file and hands it to the rank, without O_APPEND, so it cannot be truncated or replaced under the rank, which
keeps writing at its own position. Its middle can: a hole takes no disk, and leaves size, positions and readers as they are. The
rank does it itself, for the daemon may be gone. `wire/attempt/printed.py` reads such files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
import threading
from pathlib import Path

# Kept of the beginning, and at least kept of the end; up to twice as much of it lies on the disk between two looks.
# Multiples of every file system's blocks, so that no line at an edge loses a part.
_HEAD, _TAIL = 8 << 20, 24 << 20
_BLOCK = 1 << 20
_SECONDS = 1.0
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_PUNCH = 0x01 | 0x02


def cap_output(folder: Path) -> None:
    """Keep what this process writes into files below `folder` by stdout and stderr small from now on (Linux only)."""
    if sys.platform != "linux":
        return
    if files := [file for number in (1, 2) if (file := _Printed.find(number, folder)) is not None]:
        threading.Thread(target=_watch, args=(files,), name="output cap", daemon=True).start()


def _watch(files: list[_Printed]) -> None:
    never = threading.Event()
    while not never.wait(_SECONDS):
        try:
            for file in files:
                file.trim()
        except OSError as error:
            sys.stderr.write(f"sftd: what this rank prints is kept whole, however much it is: {error}\n")
            return


class _Printed:
    """A file that this process writes to."""

    def __init__(self, descriptor: int, head: int = _HEAD, tail: int = _TAIL) -> None:
        self._descriptor = descriptor
        self._tail = tail
        self._head = self._kept_from = head
        self._libc = ctypes.CDLL(None, use_errno=True)

    @classmethod
    def find(cls, descriptor: int, folder: Path) -> _Printed | None:
        """The file behind a descriptor, if it lies below the folder: what a person has redirected is theirs."""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and Path(
                os.readlink(f"/proc/self/fd/{descriptor}")
            ).is_relative_to(folder.resolve()):
                return cls(descriptor)
        return None

    def trim(self) -> None:
        """Take the middle out of it, if it has become long. Raises `OSError` where the file system cannot."""
        end = os.fstat(self._descriptor).st_size
        if end - self._kept_from <= 2 * self._tail:
            return
        until = (end - self._tail) // _BLOCK * _BLOCK
        offset, length = ctypes.c_int64(self._head), ctypes.c_int64(until - self._head)
        if self._libc.fallocate(self._descriptor, _PUNCH, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._kept_from = until
