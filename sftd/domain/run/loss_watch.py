"""Is a step's loss one to learn from? Not when it or the gradient is not a finite number, or far above the losses before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal

from sftd.domain.log import timeline as timeline_module
from sftd.domain.log.events import AnomalyDetected, Event, StepCompleted, names
from sftd.domain.log.timeline import Timeline, places

# What `losses_before` reads.
TYPES = (*timeline_module.TYPES, *names(AnomalyDetected))
# How many losses the median is taken of, and how many there must be before anything counts as a spike.
WINDOW = 64
_LEAST = 16

What = Literal["non_finite_loss", "loss_spike"]


class LossWatch:
    """Knows the losses so far. What it says is a function of them alone, so that a resumed attempt says the same."""

    def __init__(self, spike_factor: float, losses: Iterable[float] = ()) -> None:
        """`losses` are those of the steps before the first, oldest first; only the last `WINDOW` matter."""
        self._factor = spike_factor
        self._losses = deque((x for x in losses if math.isfinite(x)), maxlen=WINDOW)

    @property
    def median(self) -> float | None:
        """Median of the last losses, None while they are too few."""
        return statistics.median(self._losses) if len(self._losses) >= _LEAST else None

    def judge(self, loss: float, grad_norm: float) -> What | None:
        """What is wrong with a step, None when nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non_finite_loss"
        is_spike = self._factor and self.median is not None and loss > self._factor * self.median
        return "loss_spike" if is_spike else None

    def add(self, loss: float) -> None:
        """A step was learnt from."""
        if math.isfinite(loss):
            self._losses.append(loss)


def losses_before(events: Iterable[Event], step: int) -> list[float]:
    """The losses with which a `LossWatch` continues after the checkpoint of `step`: the last that led to it and that the model
    learnt from. Of a run's events in order, those of `TYPES` matter."""
    timeline, losses = Timeline(), list[float]()
    for event in events:
        timeline.add(event)
        if isinstance(event, StepCompleted):
            losses.append(event.loss)
        elif isinstance(event, AnomalyDetected) and event.detail.get("policy") == "skip" and losses:
            # The event follows its step.
            losses[-1] = math.nan
    before = (losses[place] for _, place in places(timeline.leading_to(step)))
    return [loss for loss in before if math.isfinite(loss)][-WINDOW:]
