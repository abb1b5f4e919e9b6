"""The SQL views `view_runs`, `view_variants`, `view_checkpoints`, `view_files`, `view_evaluations` and `view_goodput`. They are
pure functions of the log and always up to date with it.

`catch_up` runs inside every transaction that appends events (see `Store.before_commit`), and `rebuild` makes the
views again. Both use `_apply`, so their results cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched, groupby
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Recorded, RunForked, SweepJoined
from sftd.domain.run import goodput
from sftd.domain.run import state as run_state
from sftd.domain.run.fold import fold
from sftd.domain.run.retention import why_kept
from sftd.domain.run.state import Run
from sftd.store.database.engine import Store, Tx, insert
from sftd.store.database.tables import (
    view_checkpoints,
    view_evaluations,
    view_files,
    view_goodput,
    view_runs,
    view_variants,
)
from sftd.store.log import event_store, positions
from sftd.store.log import goodput as goodput_store
from sftd.store.log.runs import decode_state, encode_state

NAME = "views"
TABLES = (view_runs, view_variants, view_checkpoints, view_files, view_evaluations, view_goodput)
_BATCH = 1000
# More events than a daemon ever appends at once.
_PART = 10_000


def catch_up(tx: Tx) -> int:
    """Fold every event after the views' position. Returns the number of events."""
    connection = tx.connection
    position = positions.projection_position(connection, NAME)
    taken = 0
    if tx.appended and not event_store.any_between(connection, position, tx.appended[0].position):
        # Use the appended events instead of reading them again. In parts: an import may append millions of steps, and folding
        # them all at once would exceed the server's idle limit (`engine.IDLE_SECONDS`).
        for part in batched(tx.appended, _PART):
            _apply(connection, part)
        position = tx.appended[-1].position
        positions.set_projection_position(connection, NAME, position)
        return len(tx.appended)
    while batch := event_store.read_all(connection, position, _BATCH):
        _apply(connection, batch)
        position = batch[-1].position
        positions.set_projection_position(connection, NAME, position)
        taken += len(batch)
    return taken


def rebuild(store: Store) -> int:
    """Delete the views and fold them again from the first event, in one transaction. Returns the number of events."""
    with store.write() as tx:
        for table in TABLES:
            tx.execute(sa.delete(table))
        positions.set_projection_position(tx.connection, NAME, 0)
        return catch_up(tx)


def _apply(connection: sa.Connection, batch: Sequence[Recorded]) -> None:
    by_run = sorted(batch, key=lambda r: (r.run_id, r.version))
    new = {run_id: list(group) for run_id, group in groupby(by_run, key=lambda r: r.run_id)}
    query = sa.select(view_runs.c.run_id, view_runs.c.state).where(view_runs.c.run_id.in_(new))
    states = {run_id: decode_state(run_id, state) for run_id, state in connection.execute(query)}
    before = {run_id: states.get(run_id) or Run(run_id) for run_id in new}
    runs = {run_id: fold(before[run_id], group) for run_id, group in new.items()}
    _write(connection, view_runs, [run_row(run) for run in runs.values()])
    if variants := [row for r in by_run if (row := variant_row(r))]:
        _write(connection, view_variants, variants)
    _write_goodput(connection, runs, new)
    for run_id, run in runs.items():
        if _kept(run) != _kept(before[run_id]):
            _replace(connection, view_checkpoints, run_id, checkpoint_rows(run))
        if run.evaluations != before[run_id].evaluations:
            _replace(connection, view_evaluations, run_id, evaluation_rows(run))
    _write_files(connection, [run for run_id, run in runs.items() if _files(run) != _files(before[run_id])])


def _write(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows, or replace those with the same keys, in as few statements as the driver allows."""
    statement = insert(connection, table)
    values = {c.name: statement.excluded[c.name] for c in table.columns if not c.primary_key}
    statement = statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=values)
    connection.execute(statement, rows)


def _kept(run: Run) -> list[tuple[run_state.CheckpointInfo, str]]:
    reasons = why_kept(run)
    return [(c, ", ".join(reasons[c.step])) for c in run.checkpoints]


def _text(value: float | str | None) -> str | None:
    return None if value is None else repr(value) if isinstance(value, float) else value


def run_row(run: Run) -> dict[str, Any]:
    """The row of `view_runs` for a run."""
    return {
        "run_id": run.run_id,
        "version": run.version,
        "status": run.status,
        "project": run.spec.trainer.project_name,
        "name": run.spec.trainer.experiment_name,
        "user": run.user,
        "submitted_at": run.submitted_at,
        "started_at": run.started_at,
        "ended_at": run.ended_at,
        "updated_at": run.updated_at,
        "attempt": run.attempt,
        "step": run.step,
        "planned_steps": run.planned_steps,
        "loss": _text(run.loss),
        "val_loss": _text(run.last_validation.loss if run.last_validation else None),
        "seconds_per_step": run.seconds_per_step,
        "anomalies": run.anomalies,
        "message": f"{run.cause}: {run.message}" if run.cause else None,
        "state": encode_state(run),
    }


def _files(run: Run) -> tuple[int, int | None]:
    return run.checkpoint_bytes, run.removed_at


def files_rows(run: Run) -> list[dict[str, Any]]:
    """The row of `view_files` for a run; none while it has no own checkpoint."""
    size, removed_at = _files(run)
    has_row = size or removed_at is not None
    return [{"run_id": run.run_id, "bytes": size, "removed_at": removed_at}] if has_row else []


def _write_files(connection: sa.Connection, runs: list[Run]) -> None:
    if rows := [row for run in runs for row in files_rows(run)]:
        _write(connection, view_files, rows)
    if gone := [run.run_id for run in runs if not files_rows(run)]:
        connection.execute(sa.delete(view_files).where(view_files.c.run_id.in_(gone)))


def variant_row(recorded: Recorded) -> dict[str, Any] | None:
    """The row of `view_variants` that an event makes; None for most events."""
    match recorded.event:
        case SweepJoined(sweep=sweep, values=changed):
            pass
        case RunForked(changes=changes):
            sweep, changed = "", {key: after for key, (_, after) in changes.items()}
        case _:
            return None
    return {"run_id": recorded.run_id, "sweep": sweep, "changed": msgspec.json.encode(changed).decode()}


def goodput_row(run: Run, ledger: goodput.Fold) -> dict[str, Any]:
    """The row of `view_goodput` for a run."""
    return {
        "run_id": run.run_id,
        "version": run.version,
        "fold": msgspec.json.encode(ledger, order="sorted").decode(),
    }


def _write_goodput(connection: sa.Connection, runs: dict[str, Run], new: dict[str, list[Recorded]]) -> None:
    known = goodput_store.read_folds(connection, list(runs))
    rows = []
    for run_id, run in runs.items():
        ledger, version = known.get(run_id) or (goodput.Fold(), 0)
        if version == new[run_id][0].version - 1:
            for r in new[run_id]:
                if r.type in goodput.TYPES:
                    ledger.add(r.occurred_at, r.event)
        else:
            # The run is older than this view: fold the missing events from the log.
            goodput_store.advance(connection, run_id, ledger, version, run.version)
        rows.append(goodput_row(run, ledger))
    _write(connection, view_goodput, rows)


def checkpoint_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of `view_checkpoints` for a run."""
    return [
        {
            "run_id": run.run_id,
            "step": c.step,
            "path": c.path,
            "bytes": c.bytes,
            "manifest_digest": c.manifest_digest,
            "val_loss": _text(c.val_loss),
            "published_at": c.published_at,
            "superseded": c.superseded,
            "kept_because": kept,
        }
        for c, kept in _kept(run)
    ]


def _replace(connection: sa.Connection, table: sa.Table, run_id: str, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of a run."""
    connection.execute(sa.delete(table).where(table.c.run_id == run_id))
    if rows:
        connection.execute(sa.insert(table), rows)


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of `view_evaluations` for a run."""
    return [
        {
            "run_id": run.run_id,
            "name": x.name,
            "step": x.step,
            "status": x.status,
            "since": x.since,
            "metrics": msgspec.json.encode(x.metrics).decode(),
        }
        for x in run.evaluations
    ]
