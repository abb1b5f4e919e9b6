"""Delete a run's checkpoints, or all its files, at a user's request."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from sftd.domain.errors import Problem, Refused, RunNotFound
from sftd.domain.log import events as e
from sftd.domain.run import decisions
from sftd.domain.run.state import ENDED, ForkPoint, Run
from sftd.operations.context import Context, append_decided, current
from sftd.operations.queries.runs import find_run
from sftd.store.database.engine import Store, Tx
from sftd.store.log.runs import load_run
from sftd.wire.attempt.directory import RunDir
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.checkpoint.directory import is_checkpoint_of

# Checkpoints, and the remains of interrupted saves and deletions.
_CHECKPOINT = re.compile(r"step-\d+(\.\w+)*")


class Belongings(msgspec.Struct, frozen=True):
    """The files of a run on this host: checkpoint folders, and the run's own folder. `bytes` is their total size."""

    run: Run
    checkpoints: list[Path]
    folder: Path
    bytes: int


def belongings(store: Store, home: Path, prefix: str, *, by: str) -> Belongings:
    """The files that `remove` would delete. Raises `RunNotFound`, `AmbiguousRun`, and `Refused` as `remove` does."""
    run = find_run(store, prefix)
    decisions.remove(run, by, 0)
    return _belongings(home, run)


def _belongings(home: Path, run: Run) -> Belongings:
    own = RunDir(home, run.run_id)
    found = {Path(c.path) for c in run.checkpoints if is_checkpoint_of(c.path, run.run_id)}
    with suppress(OSError):
        found |= {
            path
            for path in own.checkpoint_dir(run.spec.checkpoint.save_dir).iterdir()
            if _CHECKPOINT.fullmatch(path.name)
        }
    outside = sorted(path for path in found if not path.is_relative_to(own.path))
    size = sum(_bytes(folder) for folder in (own.path, *outside))
    return Belongings(run, sorted(found), own.path, size)


def _bytes(folder: Path) -> int:
    """Total size of the files below a folder. Hard links count once."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                facts = os.lstat(os.path.join(root, name))
                sizes[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(sizes.values())


def remove(store: Store, context: Context, home: Path, run_id: str, by: str) -> int:
    """Delete the files of a run that has ended, and hide it from lists; its events stay. Returns the number of bytes.

    The deletion is recorded first: `finish` completes one that a crash interrupts. Raises `Refused` if the run is active, if a
    fork starts from one of its checkpoints, or if a process reads one.
    """
    with ExitStack() as unread:
        with store.read() as connection:
            found = _belongings(home, load_run(connection, run_id))
        for path in found.checkpoints:
            if not unread.enter_context(checkpoint_dir.unread(path)):
                raise Refused(Problem(run_id, f"{path} is being read", "wait until its reader has ended"))
        with store.write() as tx:
            run = current(tx.connection, run_id)
            decided = decisions.remove(run, by, found.bytes)
            append_decided(tx, context, run_id, run.version, decided)
            if run.fork is not None:
                _unpin(tx, context, run.fork, run_id)
        _delete(found)
    return found.bytes


def _unpin(tx: Tx, context: Context, point: ForkPoint, run_id: str) -> None:
    """Remove this fork's pin from the parent's checkpoint, even if the fork has rejected that checkpoint."""
    with suppress(RunNotFound):
        parent = current(tx.connection, point.parent)
        if any(run_id in forks for forks in parent.pins.values()):
            unpinned = e.CheckpointUnpinned(step=point.step, fork=run_id)
            append_decided(tx, context, parent.run_id, parent.version, [unpinned])


def _delete(found: Belongings) -> None:
    for path in found.checkpoints:
        checkpoint_dir.remove(path)
        with suppress(OSError):
            # The run's folder under `checkpoint.save_dir`, once it is empty.
            path.parent.rmdir()
    shutil.rmtree(found.folder, ignore_errors=True)


def finish(home: Path, run: Run) -> None:
    """Complete the removal of a run that a crash interrupted."""
    found = _belongings(home, run)
    if found.checkpoints or found.folder.exists():
        _delete(found)


def empty(store: Store, context: Context, run_id: str) -> list[e.CheckpointDeleted]:
    """Delete all checkpoints of a run that has ended, protected ones too, except those that a fork starts from or a process
    reads. Returns the deletions. Raises `Refused` for a run that has not ended."""
    with ExitStack() as unread:
        with store.read() as connection:
            before = unneeded(load_run(connection, run_id))
        free = {c.path for c in before if unread.enter_context(checkpoint_dir.unread(Path(c.path)))}
        with store.write() as tx:
            run = current(tx.connection, run_id)
            gone = [c for c in unneeded(run) if c.path in free]
            append_decided(tx, context, run_id, run.version, list(gone))
        for deleted in gone:
            checkpoint_dir.remove(Path(deleted.path))
    return gone


def unneeded(run: Run) -> list[e.CheckpointDeleted]:
    """Deletion events for the checkpoints from which no fork starts. Raises `Refused` if the run has not ended."""
    if run.status not in ENDED:
        raise Refused(Problem(run.run_id, f"is {run.status}", f"`sftd cancel {run.run_id}` first"))
    return [
        e.CheckpointDeleted(step=c.step, path=c.path, bytes=c.bytes, reason="asked for")
        for c in run.checkpoints
        if not (c.is_parents or c.forks) and is_checkpoint_of(c.path, run.run_id)
    ]
