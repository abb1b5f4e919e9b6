"""Re-execution is a check: a step that is done again must come out as the log already has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sftd.domain.log import events as e
from sftd.domain.spec.spec import OrderStart

REDONE_DIFFERS = "redone step differs from the log"
# The numbers of a step that a redo must reproduce bit for bit.
COMPARED = ("loss", "grad_norm", "lr", "tokens", "samples_digest")


# How far a redone step may be off where the device's kernels are not deterministic or the layout is another (BF16: a few
# units in the third digit).
_ROUNDING = {"loss": 0.02, "grad_norm": 0.2}
_ROUNDING_FP32 = {"loss": 1e-4, "grad_norm": 1e-3}


def rounds_to(dtype: str) -> dict[str, float]:
    """Number of a step → the relative difference that rounding in `dtype` may make."""
    return _ROUNDING_FP32 if dtype == "float32" else _ROUNDING


def compare_redone(
    recorded: Mapping[int, e.StepCompleted],
    redone: e.StepCompleted,
    *,
    is_exact: bool = True,
    dtype: str = "",
) -> e.AnomalyDetected | None:
    """A redone step must come out as the log has it. Compared bit for bit; two NaNs are equal.

    Unless `is_exact` (see `Run.is_exact`), loss and gradient norm may differ by rounding in `dtype`; what was trained may
    not.
    """
    was = recorded.get(redone.step)
    if was is None:
        return None
    differs = differences(was, redone, is_exact=is_exact, dtype=dtype)
    return e.AnomalyDetected(step=redone.step, what=REDONE_DIFFERS, detail=differs) if differs else None


def comparable(events: Iterable[e.Event]) -> dict[int, e.StepCompleted]:
    """Step → what a redo of it must reproduce, of events in order: the last that was recorded where the same samples were
    read as the last attempt reads."""
    found: dict[tuple[int, OrderStart | None], e.StepCompleted] = {}
    order: tuple[OrderStart, ...] = ()
    # As `evolve` has it.
    saved: dict[int, tuple[OrderStart, ...]] = {}

    def piece(step: int) -> OrderStart | None:
        return next((o for o in reversed(order) if o.step < step), None)

    for event in events:
        match event:
            case e.StepCompleted(step=step):
                found[step, piece(step)] = event
            case e.CheckpointPublished(step=step):
                saved[step] = order
            case e.SamplesSkipped(step=step, sample=sample):
                order = saved[step] = (*(o for o in order if o.step < step), OrderStart(step, sample))
            case e.AttemptClaimed(from_step=step):
                order = saved.get(step, tuple(o for o in order if o.step <= step))
    return {step: was for (step, read), was in found.items() if read == piece(step)}


def differences(
    was: e.StepCompleted, redone: e.StepCompleted, *, is_exact: bool, dtype: str = ""
) -> dict[str, dict[str, Any]]:
    """The numbers of a step that came out otherwise: name → `recorded` and `redone`. See `compare_redone`."""
    near = rounds_to(dtype)
    pairs = {name: (getattr(was, name), getattr(redone, name)) for name in COMPARED}
    return {
        name: {"recorded": a, "redone": b}
        for name, (a, b) in pairs.items()
        if not _same(a, b) and (is_exact or name not in near or not math.isclose(a, b, rel_tol=near[name]))
    }


def _same(a: object, b: object) -> bool:
    # A float's repr is exact; unlike ==, it tells -0.0 from 0.0 and takes one NaN for another.
    return repr(a) == repr(b)
