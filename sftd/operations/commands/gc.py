"""Deleting checkpoints that nothing keeps, or of a person's choice all, for runs that no daemon drives."""

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

# Reasons of deletions, where a reader wants other words.
_WHAT = {"retention": "not kept", "rejected": "damaged", "replaced": "saved elsewhere since"}


class Leftover(msgspec.Struct, frozen=True):
    """A checkpoint that nothing keeps, or of which the weights alone are kept. `what` says what becomes of it: `is_gone`, or is
    left because it is being read. `bytes` are freed."""

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
    """Delete what nothing keeps of the runs whose ids begin so, of all without any, and reduce what is kept for its weights; with
    `dry_run` only say it. `everything` deletes kept checkpoints too, except those that a fork starts from.

    Interrupted deletions are finished on the way. Raises `Refused` for a run that is being driven: its daemon does it; with
    `everything`, for each that has not ended.
    """
    found: list[Leftover] = []
    for run in _ended(store, prefixes):
        if everything:
            # All of them are asked before anything is deleted.
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
