"""Delete the checkpoints that no retention rule protects, or on request all, of runs that no daemon drives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.run.state import ACTIVE, Run
from sftd.operations.commands import remove
from sftd.operations.context import Context
from sftd.operations.driving import checkpoints, reduce
from sftd.operations.queries.runs import Filter, find_run, list_runs
from sftd.store.database.engine import Store
from sftd.wire.checkpoint import directory as checkpoint_dir

# Deletion reasons whose name is not clear to a user.
_WHAT = {"retention": "not kept", "rejected": "damaged", "replaced": "saved elsewhere since"}


class Leftover(msgspec.Struct, frozen=True):
    """A checkpoint that is deleted, or reduced to its weights. `what` is the reason, or why it stays if not `is_gone`. `bytes`
    is the space that this frees."""

    run_id: str
    step: int
    path: str
    bytes: int
    is_gone: bool
    what: str


def leftovers(
    store: Store,
    context: Context,
    prefixes: Iterable[str],
    *,
    dry_run: bool,
    home: Path,
    everything: bool = False,
) -> list[Leftover]:
    """Delete the unprotected checkpoints of the runs that `prefixes` name (all runs if empty), and reduce those of which only
    the weights are kept. `dry_run` only lists them. `everything` deletes protected checkpoints too, except those that a fork
    starts from.

    Also finishes interrupted deletions. Raises `Refused` for a named run that a daemon drives; with `everything`, for any run
    that has not ended.
    """
    found: list[Leftover] = []
    for run in _ended(store, prefixes):
        if everything:
            # Check every run before anything is deleted.
            remove.unneeded(run)
    for run in _ended(store, prefixes):
        with store.read() as connection:
            before = checkpoints.collectable(connection, run)
        reducible = {} if everything else {c.path: (c.step, freed) for c, freed in reduce.candidates(run)}
        if everything:
            before += [c for c in remove.unneeded(run) if c.path not in {b.path for b in before}]
        if dry_run:
            gone = {path for path in (*(c.path for c in before), *reducible) if _is_unread(path)}
        else:
            checkpoints.sweep(store, run.run_id)
            gone = {c.path for c in checkpoints.collect(store, context, run.run_id)}
            if everything:
                gone |= {c.path for c in remove.empty(store, context, run.run_id)}
            else:
                gone |= {c.former_path for c in reduce.reduce(store, context, run.run_id)}
        rows = [(c.step, c.path, c.bytes, _WHAT.get(c.reason, c.reason)) for c in before]
        rows += [(step, path, freed, "weights kept") for path, (step, freed) in reducible.items()]
        found += [
            Leftover(
                run_id=run.run_id,
                step=step,
                path=path,
                bytes=size,
                is_gone=path in gone,
                what=what if path in gone else "left: it is being read",
            )
            for step, path, size, what in rows
        ]
    if not dry_run:
        for row in list_runs(store, Filter(removed=True)):
            remove.finish(home, find_run(store, row.run_id))
    return found


def _ended(store: Store, prefixes: Iterable[str]) -> Iterator[Run]:
    asked = list(prefixes)
    for prefix in asked:
        run = find_run(store, prefix)
        if run.status in ACTIVE:
            raise Refused(Problem(run.run_id, f"is {run.status}", "its daemon deletes what nothing keeps"))
        yield run
    if not asked:
        for row in list_runs(store):
            if row.status not in ACTIVE:
                yield find_run(store, row.run_id)


def _is_unread(path: str) -> bool:
    with checkpoint_dir.unread(Path(path)) as free:
        return free
