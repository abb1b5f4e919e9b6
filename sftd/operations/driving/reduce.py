"""Reduce the checkpoints of succeeded runs to their weights (`checkpoint.after_success`)."""

from __future__ import annotations

from pathlib import Path

from sftd.domain.log import events as e
from sftd.domain.run.retention import reducible
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store
from sftd.store.log.runs import load_run
from sftd.store.queue import leases
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.checkpoint import reduction as checkpoint_reduction
from sftd.wire.checkpoint.directory import is_checkpoint_of


def candidates(run: Run) -> list[tuple[CheckpointInfo, int]]:
    """The checkpoints that can be reduced on this host, and the bytes that this frees."""
    found = [(c, checkpoint_reduction.saving(Path(c.path), c.manifest_digest)) for c in reducible(run)]
    return [(c, freed) for c, freed in found if freed and is_checkpoint_of(c.path, run.run_id)]


def reduce(store: Store, context: Context, run_id: str) -> list[e.CheckpointReduced]:
    """Reduce every checkpoint of which the run's spec keeps only the weights, except those that a process reads. Returns the
    reductions. Raises `OSError` when the disk fails; reductions recorded before that are complete.

    The order is: write the weights beside the checkpoint, record, delete the full checkpoint. A crash leaves at most a
    superfluous folder, which `checkpoints.sweep` removes.
    """
    with store.read() as connection:
        run = load_run(connection, run_id)
    done = []
    for c, _ in candidates(run):
        with checkpoint_dir.unread(Path(c.path)) as free:
            if not free or (made := checkpoint_reduction.reduce(Path(c.path), c.manifest_digest)) is None:
                continue
            event = e.CheckpointReduced(
                step=c.step,
                path=made.path,
                former_path=c.path,
                bytes=made.bytes,
                freed_bytes=made.freed,
                manifest_digest=made.manifest_digest,
            )
            # `checkpoints.sweep` of another process deletes weights that are not in the log and not locked.
            with checkpoint_dir.reading(Path(made.path)), store.write() as tx:
                now = current(tx.connection, run_id)
                # A resume, a fork or such a sweep may have happened in the meantime.
                is_wanted = (
                    c in reducible(now)
                    and leases.expires_at(tx.connection, run_id) is None
                    and Path(made.path).is_dir()
                )
                if is_wanted:
                    append_decided(tx, context, run_id, now.version, [event], now.attempt or None)
            if is_wanted:
                checkpoint_dir.remove(Path(c.path))
                done.append(event)
            else:
                checkpoint_dir.remove(Path(made.path))
    return done
