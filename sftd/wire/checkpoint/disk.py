"""Whether a run's checkpoints can be written, found out by writing: at submit, and by the ranks before the first step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def probe(folder: Path) -> None:
    """Write, sync and remove a small file in `folder`, or where it would be made. No folder is made for it: another
    process that makes the same folder would find it gone. Raises `OSError`."""
    fd, name = tempfile.mkstemp(prefix=".sftd-probe-", dir=nearest(folder))
    try:
        with open(fd, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(fd)
    finally:
        os.unlink(name)


def nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists; a dangling link exists. Raises `OSError`."""
    for part in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            part.lstat()
            return part
    raise FileNotFoundError(str(path))


def looks_unmounted(path: Path) -> Path | None:
    """The folder in which `path` and at least one folder above it are missing, if it is on the root file system: a disk that is
    not mounted looks so. Raises `OSError`."""
    above = nearest(path)
    is_root = above.stat().st_dev == Path("/").stat().st_dev
    return above if is_root and len(path.relative_to(above).parts) > 1 else None
