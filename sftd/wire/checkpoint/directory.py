"""The folders of a run's checkpoints, and their locks: shared for readers, exclusive for deletion.

    <checkpoint_dir>/step-00000012/           published; readers lock its `manifest.json`
    <checkpoint_dir>/step-00000012.deleted/   left by an interrupted deletion, for `sweep`
    <checkpoint_dir>/step-00000012.replaced/  left by an interrupted replacement, where folders cannot be exchanged

The lock is an flock on the manifest. The kernel releases it when its process ends, even by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from sftd.wire.attempt.directory import fsync_dir

MANIFEST = "manifest.json"
# See `reduction`.
WEIGHTS = ".weights"
_DELETED = ".deleted"
# See `folder_swap.publish_folder` of the trainer.
_REPLACED = ".replaced"
_LOOK_SECONDS = 0.05
# Enough for a hundred thousand files.
_MANIFEST_BYTES = 64 << 20
# Errors of flock on file systems without locks, where work continues unprotected.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


class Saved(msgspec.Struct, frozen=True):
    """How a checkpoint was saved, from its manifest: the sizes of the layout by lower-case name, and torch's dtype name."""

    layout: dict[str, int] = {}
    dtype: str = ""


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of a checkpoint folder's manifest. Raises `OSError`, also for a link, a device, a pipe (which could
    block the reader) and a file that is too large."""
    fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(folder / MANIFEST))
        if facts.st_size > _MANIFEST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder / MANIFEST))
        return file.read()


def is_checkpoint_of(folder: str, run_id: str) -> bool:
    """Whether the folder's manifest names this run. Only such folders are deleted as checkpoints."""
    try:
        manifest = msgspec.json.decode(manifest_bytes(Path(folder)), type=dict[str, Any])
    except (OSError, ValueError, RecursionError):
        return False
    return manifest.get("run_id") == run_id


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep the checkpoint in `path` from being deleted until the block ends.

    A missing checkpoint is not an error here: the reader raises a better one.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                fd = os.open(path / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                break
            stack.callback(os.close, fd)
            # This waits only briefly: a deletion holds its lock just for a rename.
            _lock(fd, fcntl.LOCK_SH)
            if _is_named(fd, path / MANIFEST):
                break
        yield


@contextlib.contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Keep readers from the checkpoint in `path` until the block ends. Yields False while a process reads it, True for a
    missing checkpoint."""
    try:
        # NFS allows an exclusive lock only on a writable descriptor.
        fd = os.open(path / MANIFEST, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        # A folder without a manifest is not a checkpoint, so no process reads it.
        fd = -1
    try:
        yield fd < 0 or _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def once_unread(path: Path, seconds: float) -> Iterator[None]:
    """Wait for the readers of the checkpoint in `path`, then keep new readers out until the block ends. They then read the
    folder that has this name. Raises `OSError` when a process still reads it after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        with unread(path) as free:
            if free:
                yield
                return
        if time.monotonic() >= until:
            raise OSError(errno.EBUSY, f"another process has been reading it for {seconds:.0f} s", str(path))
        time.sleep(_LOOK_SECONDS)


def delete_folder(path: Path) -> bool:
    """Delete a checkpoint. Returns False and does nothing while a process reads it."""
    with unread(path) as free:
        if free:
            remove(path)
        return free


def remove(path: Path) -> None:
    """Delete a checkpoint inside a block of `unread`. A missing one is not an error.

    Renames the folder first, so that no half-deleted folder has the name of a checkpoint. After a crash `sweep` finishes the
    deletion.
    """
    gone = path.with_name(path.name + _DELETED)
    # Left by an earlier deletion of the same step. A rename onto a non-empty folder fails.
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(gone)
        fsync_dir(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def saved(path: Path) -> Saved:
    """How the checkpoint in `path` was saved, unverified; empty when its manifest cannot be read."""
    try:
        return msgspec.json.decode(manifest_bytes(path), type=Saved)
    except (OSError, ValueError, RecursionError):
        return Saved()


def sweep(directory: Path, deleted: Iterable[Path] = ()) -> None:
    """Finish deletions and replacements of a run's checkpoints that a crash or a reader interrupted.

    `deleted` are the folders whose deletion is in the log. Call it only while no attempt of the run is running: an attempt may
    have published one of these names again before the log records it.
    """
    for left in directory.glob(f"step-*{WEIGHTS}.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f"step-*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f"step-*{_REPLACED}"):
        published = left.with_name(left.name.removesuffix(_REPLACED))
        # If the crash was between the two renames, no folder has the name: restore the old one.
        if published.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(published)
    for path in deleted:
        if path.exists():
            delete_folder(path)


def _lock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_named(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file, which may have been deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
