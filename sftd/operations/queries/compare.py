"""Compare runs: settings, curves and cost. Nothing here writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from sftd.domain.compare.curves import Curves, RunCurves
from sftd.domain.compare.differences import Difference, Parting, differences, part
from sftd.domain.errors import Problem, Refused, RunNotFound
from sftd.domain.log import events as e
from sftd.domain.log.events import Micros
from sftd.domain.run.goodput import Ledger
from sftd.domain.run.state import ENDED, Run
from sftd.store.database.engine import Store
from sftd.store.log import curves as curve_store
from sftd.store.log import event_store
from sftd.store.log.runs import load_run
from sftd.store.queries.resolve import resolve_id

# The last loss is that of one batch. The mean over this share of the steps is less noisy.
_TAIL = 0.05


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A run in numbers; None is unknown. `inherited_steps` and their tokens are those of parents, before the fork. Validations,
    time, devices and speed are the run's own. `tail_loss` and `token_accuracy` are means over the last 5 % of the steps,
    `source_losses` those of the last step."""

    run_id: str
    status: str
    name: str
    parent: str | None
    inherited_steps: int
    step: int
    planned_steps: int
    attempts: int
    steps_redone: int
    anomalies: int
    loss: float | str | None
    tail_loss: float | None
    token_accuracy: float | None
    source_losses: dict[str, float]
    lowest_loss: float | None
    lowest_loss_step: int | None
    val_loss: float | str | None
    best_val_loss: float | str | None
    best_val_step: int | None
    tokens: int
    tokens_per_second: float | None
    mfu: float | None
    peak_memory_bytes: int | None
    wall_seconds: float
    held_seconds: float
    goodput: float | None
    devices: int
    device_hours: float
    cost: float | None
    message: str | None


class Side(msgspec.Struct, frozen=True):
    """One of the compared runs."""

    run: Run
    curves: Curves
    ledger: Ledger
    figures: Figures


class Compared(msgspec.Struct, frozen=True):
    """Runs in the order of the request. `partings` compares each of the other runs with the first."""

    sides: list[Side]
    differences: list[Difference]
    partings: list[Parting]


def compare(store: Store, prefixes: Sequence[str], now: Micros, price: float | None = None) -> Compared:
    """Compare the runs whose ids begin with these prefixes. `price` is the cost of one device for one hour.

    Raises `RunNotFound`, `AmbiguousRun`, or `Refused` if a run is named twice.
    """
    with store.read() as connection:
        names = [resolve_id(connection, prefix) for prefix in prefixes]
        if twice := {name for name in names if names.count(name) > 1}:
            what = f"{', '.join(sorted(twice))} is named more than once"
            raise Refused(Problem("RUN", what, "name each run once"))
        runs = [load_run(connection, name) for name in names]
        sides = [_side(connection, run, now, price) for run in runs]
        submitted = [_submitted(connection, name) for name in names]
    first = sides[0]
    partings = [
        part(first.curves, side.curves, side.run.run_id, {first.run.dtype, side.run.dtype})
        for side in sides[1:]
    ]
    return Compared(sides, differences(runs, submitted), partings)


def _side(connection: sa.Connection, run: Run, now: Micros, price: float | None) -> Side:
    history = RunCurves(_inherited(connection, run))
    curve_store.advance(connection, run.run_id, history, until_version=run.version)
    ledger = history.fold.ledger(now)
    last = event_store.last_step(connection, run.run_id)
    return Side(run, history.curves, ledger, _figures(run, history, last, ledger, now, price))


def _inherited(connection: sa.Connection, run: Run) -> Curves:
    """The curves before the fork, from those of its parents that are in this database."""
    if run.fork is None or run.fork.step == 0:
        return Curves()
    forked = next(event_store.read_stream(connection, run.run_id, limit=1)).event
    assert isinstance(forked, e.RunForked)
    try:
        parent = load_run(connection, forked.parent)
    except RunNotFound:
        return Curves()
    history = RunCurves(_inherited(connection, parent))
    until = event_store.branch_version(connection, forked)
    curve_store.advance(connection, parent.run_id, history, until_version=until)
    history.curves.take(forked)
    return history.curves


def _submitted(connection: sa.Connection, run_id: str) -> e.RunSubmitted | None:
    found = event_store.read_stream(connection, run_id, types=(e.RunSubmitted.__name__,), limit=1)
    event = next((r.event for r in found), None)
    return event if isinstance(event, e.RunSubmitted) else None


def _figures(
    run: Run,
    history: RunCurves,
    last_step: e.StepCompleted | None,
    ledger: Ledger,
    now: Micros,
    price: float | None,
) -> Figures:
    curves = history.curves
    own = run.first_step + 1
    seconds = math.fsum(curves.values("seconds", own, curves.last))
    trained = sum(curves.values("tokens_real", own, curves.last))
    tail = max(1, round(_TAIL * len(curves)))
    lowest = curves.lowest("loss")
    hours = history.device_seconds(ledger.until if run.status in ENDED else now, run.spec.world_size) / 3600
    launched = [turn.devices for turn in history.turns if turn.devices]
    best, last = run.best_validation, run.last_validation
    return Figures(
        run_id=run.run_id,
        status=run.status,
        name="/".join(p for p in (run.spec.trainer.project_name, run.spec.trainer.experiment_name) if p),
        parent=run.fork.parent if run.fork else None,
        inherited_steps=run.first_step,
        step=run.step,
        planned_steps=run.planned_steps,
        attempts=run.attempt,
        steps_redone=run.steps_redone,
        anomalies=run.anomalies,
        loss=run.loss if run.loss is not None else _last_loss(curves),
        tail_loss=curves.mean("loss", curves.last - tail + 1, curves.last) if len(curves) else None,
        token_accuracy=curves.mean("token_accuracy", curves.last - tail + 1, curves.last)
        if len(curves)
        else None,
        source_losses={
            name: of.loss for name, of in ((last_step.sources if last_step else None) or {}).items()
        },
        lowest_loss=lowest[1] if lowest else None,
        lowest_loss_step=lowest[0] if lowest else None,
        val_loss=last.loss if last else None,
        best_val_loss=best.loss if best else None,
        best_val_step=best.step if best else None,
        tokens=run.tokens_counted,
        tokens_per_second=trained / seconds if seconds > 0 else None,
        mfu=curves.mean_over_time("mfu", own, curves.last),
        peak_memory_bytes=int(max(curves.values("memory", own, curves.last), default=0)) or None,
        wall_seconds=ledger.wall_seconds,
        held_seconds=ledger.held_seconds,
        goodput=ledger.goodput,
        devices=launched[-1] if launched else run.spec.world_size,
        device_hours=hours,
        cost=None if price is None else hours * price,
        message=f"{run.cause}: {run.message}" if run.cause else None,
    )


def _last_loss(curves: Curves) -> float | None:
    return curves.at("loss", curves.last) if len(curves) else None
