"""Keeping the weights alone of checkpoints of runs that have succeeded (`checkpoint.after_success`)."""

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
    """What can be reduced on this host, and the bytes that it frees."""
    found = [(c, checkpoint_reduction.saving(Path(c.path), c.manifest_digest)) for c in reducible(run)]
    return [(c, freed) for c, freed in found if freed and is_checkpoint_of(c.path, run.run_id)]


def reduce(store: Store, context: Context, run_id: str) -> list[e.CheckpointReduced]:
    """Reduce every checkpoint of which the run's spec keeps the weights alone, except those that somebody reads. Returns what was
    done. Raises `OSError` when the disk fails; what was recorded until then is done.

    The weights are put beside the checkpoint, that is recorded, then the whole one is deleted. A crash leaves at most a
    folder too many, for `checkpoints.sweep`.
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
            # Until the log names the weights, another command's `checkpoints.sweep` takes them for a crash's.
            with checkpoint_dir.reading(Path(made.path)), store.write() as tx:
                now = current(tx.connection, run_id)
                # A resume or a fork may have come meanwhile, or such a sweep.
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
