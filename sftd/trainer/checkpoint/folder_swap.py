"""Atomic replacement of a folder: a reader always finds the complete old or the complete new one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from sftd.wire.attempt.directory import fsync_dir

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of renameat2 when the file system (NFS, some FUSE) or the kernel does not support the exchange.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def fsync_file(path: Path) -> None:
    """Make a file's contents durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish_folder(new: Path, published: Path) -> None:
    """Rename `new` to `published`, replacing an existing folder, and make the rename durable."""
    if published.exists():
        if not _exchange(new, published):
            # A crash between the two renames leaves the old folder intact under the other name.
            aside = published.with_name(published.name + ".replaced")
            shutil.rmtree(aside, ignore_errors=True)
            published.rename(aside)
            new.rename(published)
            new = aside
        fsync_dir(published.parent)
        shutil.rmtree(new, ignore_errors=True)
    else:
        new.rename(published)
        fsync_dir(published.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders atomically. False if that is unsupported. Raises `OSError`."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))
