"""The folders of a run's checkpoints: a process that reads one holds its lock, one that deletes it asks for the lock.

    <checkpoint_dir>/step-00000012/           published; `manifest.json` is what a reader locks
    <checkpoint_dir>/step-00000012.deleted/   what an interrupted deletion left, for `sweep`
    <checkpoint_dir>/step-00000012.replaced/  what an interrupted replacement left, where folders cannot be exchanged

The lock is an flock on the manifest: it ends with the process that holds it, however that ends.
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
# Of a checkpoint of a hundred thousand files.
_MANIFEST_BYTES = 64 << 20
# What flock answers where the file system cannot lock: work continues there without protection.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


class Saved(msgspec.Struct, frozen=True):
    """What the manifest of a checkpoint says of how it was saved: the sizes of the layout by their names in lower case, and
    torch's name of the dtype."""

    layout: dict[str, int] = {}
    dtype: str = ""


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of a checkpoint folder's manifest. Raises `OSError`, also for a link, a device, a pipe (which would
    keep its reader waiting) and for a file that is too large for a manifest."""
    fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(folder / MANIFEST))
        if facts.st_size > _MANIFEST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder / MANIFEST))
        return file.read()


def is_checkpoint_of(folder: str, run_id: str) -> bool:
    """Whether a folder is a checkpoint of this run by its own manifest: nothing else is ever deleted as one."""
    try:
        manifest = msgspec.json.decode(manifest_bytes(Path(folder)), type=dict[str, Any])
    except (OSError, ValueError, RecursionError):
        return False
    return manifest.get("run_id") == run_id


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep the checkpoint in `path` from being deleted until the block ends.

    One that is not there, or went away just now, is no error here: the reader finds out, and has the better words.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                fd = os.open(path / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                break
            stack.callback(os.close, fd)
            # A deleter holds its lock only for a rename.
            _lock(fd, fcntl.LOCK_SH)
            if _is_named(fd, path / MANIFEST):
                break
        yield


@contextlib.contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Keep readers from the checkpoint in `path` until the block ends. False when somebody reads it; one that is not there
    is not read."""
    try:
        # Writable: over NFS only such a file can be locked exclusively.
        fd = os.open(path / MANIFEST, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        # Without a manifest it is no checkpoint, and nobody loads it.
        fd = -1
    try:
        yield fd < 0 or _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def once_unread(path: Path, seconds: float) -> Iterator[None]:
    """Wait for the readers of the checkpoint in `path`, then keep others from it until the block ends: they read what has
    that name afterwards. Raises `OSError` when it is still being read after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        with unread(path) as free:
            if free:
                yield
                return
        if time.monotonic() >= until:
            raise OSError(errno.EBUSY, f"somebody has been reading it for {seconds:.0f} s", str(path))
        time.sleep(_LOOK_SECONDS)


def delete_folder(path: Path) -> bool:
    """Delete a checkpoint. False, and nothing is done, while somebody reads it: try again later."""
    with unread(path) as free:
        if free:
            remove(path)
        return free


def remove(path: Path) -> None:
    """Delete a checkpoint that is known to be `unread`.

    It changes its name first, so that no half-deleted folder ever has the name of a checkpoint, and `sweep` finishes
    what a crash interrupts. One that is not there is deleted.
    """
    gone = path.with_name(path.name + _DELETED)
    # Of an earlier deletion of the same step: a folder cannot be renamed to one that holds something.
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
    """Finish the deletions and replacements of a run's folder of checkpoints that a crash or a reader interrupted.

    `deleted` are the folders whose deletion is in the log. Call it only while no attempt of the run lives: an attempt may
    have published one of these names again, and the log does not have that yet.
    """
    for left in directory.glob(f"step-*{WEIGHTS}.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f"step-*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f"step-*{_REPLACED}"):
        published = left.with_name(left.name.removesuffix(_REPLACED))
        # Between the two renames nothing had the name.
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
    """Whether `path` still names the open file: it may have been deleted, or another published in its place."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
