"""Deleting checkpoints that nothing keeps, for runs that no daemon drives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.run import ACTIVE, Run
from sftd.operations import checkpoints
from sftd.operations.context import Context
from sftd.operations.reading import find_run, list_runs
from sftd.store.engine import Store
from sftd.wire import checkpoint_dir

# Reasons of deletions, where a reader wants other words.
_WHAT = {"retention": "not kept", "rejected": "damaged", "replaced": "saved elsewhere since"}


class Leftover(msgspec.Struct, frozen=True):
    """A checkpoint that nothing keeps. `what` says what becomes of it: `is_gone`, or is left because it is being read."""

    run_id: str
    step: int
    path: str
    bytes: int
    is_gone: bool
    what: str


def leftovers(store: Store, context: Context, prefixes: Iterable[str], *, dry_run: bool) -> list[Leftover]:
    """Delete what nothing keeps of the runs whose ids begin so, of all without any; with `dry_run` only say it.

    Interrupted deletions are finished on the way. Raises `Refused` for a run that is being driven: its daemon does it.
    """
    found: list[Leftover] = []
    for run in _ended(store, prefixes):
        with store.read() as connection:
            before = checkpoints.collectable(connection, run)
        if dry_run:
            gone = {c.path for c in before if _is_unread(c.path)}
        else:
            checkpoints.sweep(store, run.run_id)
            gone = {c.path for c in checkpoints.collect(store, context, run.run_id)}
        found += [
            Leftover(
                run_id=run.run_id,
                step=c.step,
                path=c.path,
                bytes=c.bytes,
                is_gone=c.path in gone,
                what=_WHAT.get(c.reason, c.reason) if c.path in gone else "left: it is being read",
            )
            for c in before
        ]
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
