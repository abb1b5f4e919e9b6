"""Whether a run's checkpoints can be written, found out by writing: at submit, and by the ranks before the first step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def probe(folder: Path) -> None:
    """Write, sync and remove a small file in `folder`, and leave nothing behind: folders that are missing are made for it and
    removed again. Raises `OSError`."""
    made = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.is_dir():
                with contextlib.suppress(FileExistsError):
                    part.mkdir(mode=0o700)
                    made.append(part)
        fd, name = tempfile.mkstemp(prefix=".sftd-probe-", dir=folder)
        try:
            with open(fd, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(fd)
        finally:
            os.unlink(name)
    finally:
        for part in reversed(made):
            # Another process may have put something there meanwhile.
            with contextlib.suppress(OSError):
                part.rmdir()


def nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists. Raises `OSError`."""
    return next(p for p in (path, *path.parents) if p.exists())


def looks_unmounted(path: Path) -> Path | None:
    """The folder in which `path` and at least one folder above it are missing, if it is on the root file system: a disk that is
    not mounted looks so. Raises `OSError`."""
    above = nearest(path)
    is_root = above.stat().st_dev == Path("/").stat().st_dev
    return above if is_root and len(path.relative_to(above).parts) > 1 else None
