"""Limits the disk space of a rank's output: a long file keeps its beginning and its end.

torchrun opens the file without O_APPEND and passes it to the rank. It cannot be truncated or replaced, because the rank
writes at its own position. But a hole can be punched in its middle: that frees the space, and size, positions and readers
are unaffected. The rank does this itself, because the daemon may be gone. `wire/attempt/printed.py` reads such files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
import threading
from pathlib import Path

# Bytes kept of the beginning, and minimum kept of the end. A trim starts when the end is twice as long. Both are multiples
# of every file system's blocks, so that the kept parts stay intact.
_HEAD, _TAIL = 8 << 20, 24 << 20
_BLOCK = 1 << 20
_SECONDS = 1.0
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_PUNCH = 0x01 | 0x02


def cap_output(folder: Path) -> None:
    """Limit stdout and stderr of this process from now on if they are files below `folder` (Linux only)."""
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
            sys.stderr.write(f"sftd: the size of this rank's output is not limited: {error}\n")
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
        """The file of a descriptor if it lies below the folder. A file that the user redirected to is left alone."""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and Path(
                os.readlink(f"/proc/self/fd/{descriptor}")
            ).is_relative_to(folder.resolve()):
                return cls(descriptor)
        return None

    def trim(self) -> None:
        """Punch a hole in the middle of a long file. Raises `OSError` if the file system does not support that."""
        end = os.fstat(self._descriptor).st_size
        if end - self._kept_from <= 2 * self._tail:
            return
        until = (end - self._tail) // _BLOCK * _BLOCK
        offset, length = ctypes.c_int64(self._head), ctypes.c_int64(until - self._head)
        if self._libc.fallocate(self._descriptor, _PUNCH, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._kept_from = until
