"""A run's plan compared with its results. The plan is recomputed from the run's log (docs/plan.md explains why)."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import SftdError
from sftd.domain.log import events as e
from sftd.domain.model.shape import ModelShape, recorded_shape
from sftd.domain.plan.batch import workload
from sftd.domain.plan.duration import Machine, step_seconds
from sftd.domain.plan.plan import Plan, PlanInputs, make_plan
from sftd.domain.plan.sizes import weights_dtype
from sftd.domain.run.state import ENDED, Run


class PlannedAndMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity, in bytes or seconds. `actual` is None if the log does not have it yet."""

    name: str
    unit: str
    planned: float
    actual: float | None

    @property
    def error(self) -> float | None:
        """(planned − actual) ÷ actual."""
        return None if not self.actual else self.planned / self.actual - 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a run, and planned next to measured quantities."""

    plan: Plan
    compared: list[PlannedAndMeasured]

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        compared = {
            c.name: {"unit": c.unit, "planned": c.planned, "actual": c.actual, "error": c.error}
            for c in self.compared
        }
        return {"compared": compared, "plan": self.plan.as_json()}


class MeasuredRun(msgspec.Struct, frozen=True):
    """State and submission of a run that was trained."""

    run: Run
    submitted: e.RunSubmitted


def facts(run: Run, submitted: e.RunSubmitted) -> PlanInputs | None:
    """The file facts that submit recorded for the run; None if an older sftd recorded too few."""
    try:
        shape = recorded_shape(submitted.model)
        train = msgspec.convert(submitted.data["train"], DataFacts)
        val = submitted.data.get("val")
        return PlanInputs(
            shape=shape,
            train=train,
            val=msgspec.convert(val, DataFacts) if val else None,
            planned_steps=run.planned_steps,
            first_step=run.first_step,
        )
    except (msgspec.ValidationError, KeyError):
        return None


def machine(run: Run) -> Machine | None:
    """The machine of the last attempt; None before the first attempt, and if an older sftd did not record it."""
    name = run.environment.get("device")
    if not isinstance(name, str):
        return None
    threads = run.environment.get("threads")
    cores = (threads if isinstance(threads, int) else 1) * run.spec.world_size
    return Machine(device="cpu" if name == "cpu" else "cuda", name=name, cores=cores)


def calibration(shape: ModelShape, here: Machine, earlier: list[MeasuredRun]) -> float | None:
    """Median ratio of measured to planned step time, over earlier runs with this shape, device and dtype. None without such
    runs."""
    found = []
    for history in earlier:
        run = history.run
        known, there = facts(run, history.submitted), machine(run)
        if known is None or there is None or run.seconds_per_step is None:
            continue
        if (
            known.shape != shape
            or there.name != here.name
            or weights_dtype(run.spec, there.device) != (run.dtype or "")
        ):
            continue
        work = workload(run.spec, known.train, run.planned_steps - run.first_step, there.device)
        found.append(run.seconds_per_step / step_seconds(run.spec, shape, work, there)[0])
    return statistics.median(found) if found else None


def outcome(
    run: Run,
    submitted: e.RunSubmitted,
    last_step: e.StepCompleted | None,
    held_seconds: float,
    earlier: list[MeasuredRun],
) -> Outcome | None:
    """The comparison, or None until an attempt has loaded its model. `held_seconds`: time for which the run held devices.
    `earlier`: the runs that were available to the plan."""
    known, where = facts(run, submitted), machine(run)
    if known is None or where is None:
        return None
    try:
        plan = make_plan(run.spec, known, where, calibration(known.shape, where, earlier))
    except (SftdError, ArithmeticError):
        return None
    own = [c for c in run.checkpoints if not c.is_parents]
    total = held_seconds if run.status in ENDED and run.step == run.planned_steps else None
    return Outcome(
        plan=plan,
        compared=[
            PlannedAndMeasured(
                name="peak memory",
                unit="bytes",
                planned=plan.fullest.total,
                actual=last_step.peak_memory_bytes if last_step else None,
            ),
            PlannedAndMeasured(
                name="step", unit="seconds", planned=plan.pace.step, actual=run.seconds_per_step
            ),
            PlannedAndMeasured(name="whole run", unit="seconds", planned=plan.pace.total, actual=total),
            PlannedAndMeasured(
                name="checkpoint",
                unit="bytes",
                planned=plan.storage.checkpoint,
                actual=own[-1].bytes if own else None,
            ),
            PlannedAndMeasured(
                name="checkpoints kept",
                unit="bytes",
                planned=plan.storage.at_end,
                actual=sum(c.bytes for c in own) if own and run.status == "succeeded" else None,
            ),
        ],
    )
