"""Comparison of recomputed steps with the log, which they must match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from sftd.domain.log import events as e
from sftd.domain.log.timeline import Timeline

REDONE_DIFFERS = "redone step differs from the log"
# The numbers of a step that a redo must reproduce bit for bit.
COMPARED = ("loss", "grad_norm", "lr", "tokens", "samples_digest")
# As those, if the record has them. Rounding may change which of two tokens is more probable, so these need equal bits.
_FIGURES = ("token_accuracy", "entropy", "sources")


# Relative tolerances for a redone step if kernels are not deterministic or the layout differs (BF16: a few units in the
# third digit).
_ROUNDING = {"loss": 0.02, "grad_norm": 0.2}
_ROUNDING_FP32 = {"loss": 1e-4, "grad_norm": 1e-3}


def rounds_to(dtype: str) -> dict[str, float]:
    """Number of a step → relative difference that rounding in `dtype` can cause."""
    return _ROUNDING_FP32 if dtype == "float32" else _ROUNDING


class Redone(NamedTuple):
    """The result of comparing a recomputed step with the log.

    `differs` maps the names of numbers outside their tolerance to `recorded` and `redone`. `is_exact`: all numbers match bit
    for bit.
    """

    step: int
    differs: dict[str, dict[str, Any]]
    is_exact: bool

    @property
    def anomaly(self) -> e.AnomalyDetected | None:
        """The event that records the difference; None if there is none."""
        if not self.differs:
            return None
        return e.AnomalyDetected(step=self.step, what=REDONE_DIFFERS, detail=self.differs)


def compare(
    was: e.StepCompleted, redone: e.StepCompleted, *, is_exact: bool = True, dtype: str = ""
) -> Redone:
    """Compare a step with the log's, bit for bit; NaN equals NaN.

    Without `is_exact` (see `Run.is_exact`), loss and gradient norm may differ by rounding in `dtype`; rows, tokens and
    learning rate may not.
    """
    figures = [name for name in _FIGURES if is_exact and getattr(was, name) is not None]
    pairs = {
        name: (msgspec.to_builtins(getattr(was, name)), msgspec.to_builtins(getattr(redone, name)))
        for name in (*COMPARED, *figures)
    }
    other = {name: pair for name, pair in pairs.items() if not is_same(*pair)}
    near = {} if is_exact else rounds_to(dtype)
    differs = {
        name: {"recorded": a, "redone": b}
        for name, (a, b) in other.items()
        if name not in near or is_apart(a, b, near[name])
    }
    return Redone(redone.step, differs, not other)


def steps_to_redo(events: Iterable[e.Event]) -> dict[int, e.StepCompleted]:
    """Step → record that the last attempt must reproduce: the last one with the samples that this attempt reads. `events` are
    those of a run, in order; only `timeline.TYPES` matter."""
    timeline, steps = Timeline(), []
    for event in events:
        timeline.add(event)
        if isinstance(event, e.StepCompleted):
            steps.append(event)
    return {step: steps[place] for step, place in timeline.to_redo().items()}


def redone_steps(events: Iterable[e.Event]) -> Iterator[tuple[e.StepCompleted, e.StepCompleted]]:
    """(record, step that must reproduce it) for each redone step of a run's events."""
    timeline, steps = Timeline(), list[e.StepCompleted]()
    for event in events:
        if isinstance(event, e.StepCompleted):
            place = timeline.before(event.step)
            if place is not None:
                yield steps[place], event
            steps.append(event)
        timeline.add(event)


def is_same(a: object, b: object) -> bool:
    """Whether two numbers are the same, bit for bit."""
    # A float's repr is exact. In contrast to ==, -0.0 differs from 0.0 and NaN equals NaN.
    return repr(a) == repr(b)


def is_apart(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers differ by more than a relative tolerance. Non-finite numbers must be the same."""
    if a - a != 0.0 or b - b != 0.0:
        return not is_same(a, b)
    return abs(a - b) > tolerance * max(abs(a), abs(b))
