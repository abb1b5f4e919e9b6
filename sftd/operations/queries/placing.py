"""The hosts on which a run can continue: without shared storage, only one has its checkpoint. Nothing here writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import AttemptClaimed
from sftd.domain.queue.order import Entry
from sftd.operations.context import current
from sftd.store.log import event_store
from sftd.store.queue import daemons


class Start(msgspec.Struct, frozen=True):
    """The checkpoint from which a run's next attempt starts, and the host that had it last (empty if unknown)."""

    step: int
    path: str
    host: str


def start_of(connection: sa.Connection, run_id: str) -> Start | None:
    """Where the run continues. None is the pretrained model, which is on every host."""
    run = current(connection, run_id)
    found = run.restart_checkpoint
    if found is None:
        return None
    owner = run.fork.parent if found.is_parents and run.fork else run_id
    claims = event_store.read_types(connection, [owner], (AttemptClaimed.__name__,))
    hosts = [r.event.host for r in claims if isinstance(r.event, AttemptClaimed)]
    return Start(found.step, found.path, hosts[-1] if hosts else "")


def placed(connection: sa.Connection, entries: Sequence[Entry]) -> list[Entry]:
    """The entries, with `only_on` set for those that can continue on one host only. Only that host is assumed to have a
    checkpoint inside a daemon's home; all hosts are assumed to share other folders (`checkpoint.save_dir`)."""
    begun = [entry.run_id for entry in entries if entry.started_at is not None]
    if not begun:
        return list(entries)
    homes = {row.home for row in daemons.every(connection)}
    starts = {run_id: start_of(connection, run_id) for run_id in begun}
    hosts = {
        run_id: start.host
        for run_id, start in starts.items()
        if start is not None and start.host and any(Path(start.path).is_relative_to(home) for home in homes)
    }
    return [
        msgspec.structs.replace(entry, only_on=hosts[entry.run_id]) if entry.run_id in hosts else entry
        for entry in entries
    ]
