"""Test by writing whether a run's checkpoints can be written: at submit, and by the ranks before the first step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def probe(folder: Path) -> None:
    """Write, sync and remove a small file in `folder` or its nearest existing parent. Makes no folder, because removing it
    could break another process that uses it. Raises `OSError`."""
    fd, name = tempfile.mkstemp(prefix=".sftd-probe-", dir=nearest(folder))
    try:
        with open(fd, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(fd)
    finally:
        os.unlink(name)


def nearest(path: Path) -> Path:
    """`path`, or the nearest existing folder above it. A dangling link counts as existing. Raises `OSError`."""
    for part in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            part.lstat()
            return part
    raise FileNotFoundError(str(path))


def looks_unmounted(path: Path) -> Path | None:
    """The nearest existing folder above `path`, if it is on the root file system and at least two levels are missing below it,
    as if a disk were not mounted. Otherwise None. Raises `OSError`."""
    above = nearest(path)
    is_root = above.stat().st_dev == Path("/").stat().st_dev
    return above if is_root and len(path.relative_to(above).parts) > 1 else None
