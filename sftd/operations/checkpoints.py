"""What people do with a run's published checkpoints: find one, record that its model was exported."""

from __future__ import annotations

from pathlib import Path

from sftd.domain.errors import Problem, Refused
from sftd.domain.events import ModelExported
from sftd.domain.run import CheckpointInfo, Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.engine import Store
from sftd.store.runs import load_run, resolve_id


def find(store: Store, prefix: str, step: int | None) -> tuple[Run, CheckpointInfo]:
    """The one run whose id begins with `prefix`, and its published checkpoint of `step`; None is the timeline's newest.

    Raises `RunNotFound` or `AmbiguousRun`, and `Refused` when there is no such checkpoint, or not on this host.
    """
    with store.read() as connection:
        run = load_run(connection, resolve_id(connection, prefix))
    timeline = [c for c in run.checkpoints if not c.superseded]
    if step is None:
        found = timeline[-1] if timeline else None
    else:
        found = next((c for c in run.checkpoints if c.step == step), None)
    if found is None:
        have = ", ".join(str(c.step) for c in run.checkpoints)
        if have:
            which = f"no checkpoint of step {step}" if step is not None else "no checkpoint in its timeline"
            raise Refused(Problem(run.run_id, f"has {which}", f"use --step with one of {have}"))
        mend = "wait until it has saved one (trainer.save_interval), or resume it"
        raise Refused(Problem(run.run_id, f"is {run.status} and has no published checkpoint", mend))
    if not Path(found.path).is_dir():
        what = f"its checkpoint of step {found.step} is not on this host: {found.path}"
        raise Refused(Problem(run.run_id, what, "ask on the host that trained it, or put the folder back"))
    return run, found


def record_export(store: Store, context: Context, run_id: str, exported: ModelExported) -> None:
    """Record that the model of a checkpoint was exported."""
    with store.write() as tx:
        run = current(tx.connection, run_id)
        append_decided(tx, context, run_id, run.version, [exported])
