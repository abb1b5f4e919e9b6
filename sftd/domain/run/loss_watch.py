"""Detection of bad steps: loss or gradient norm is not finite, or the loss is far above the previous losses."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal

from sftd.domain.log import timeline as timeline_module
from sftd.domain.log.events import AnomalyDetected, Event, StepCompleted, names
from sftd.domain.log.timeline import Timeline, places

# The event types that `losses_before` reads.
TYPES = (*timeline_module.TYPES, *names(AnomalyDetected))
# Number of losses in the median, and the minimum number before a loss can be a spike.
WINDOW = 64
_LEAST = 16

What = Literal["non_finite_loss", "loss_spike"]


class LossWatch:
    """Judges steps by the previous losses only, so that a resumed attempt gets the same results."""

    def __init__(self, spike_factor: float, losses: Iterable[float] = ()) -> None:
        """`losses` are those of the previous steps, oldest first; only the last `WINDOW` matter."""
        self._factor = spike_factor
        self._losses = deque((x for x in losses if math.isfinite(x)), maxlen=WINDOW)

    @property
    def median(self) -> float | None:
        """Median of the last losses; None if there are too few."""
        return statistics.median(self._losses) if len(self._losses) >= _LEAST else None

    def judge(self, loss: float, grad_norm: float) -> What | None:
        """The problem of a step; None if there is none."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non_finite_loss"
        is_spike = self._factor and self.median is not None and loss > self._factor * self.median
        return "loss_spike" if is_spike else None

    def add(self, loss: float) -> None:
        """Add the loss of an accepted step."""
        if math.isfinite(loss):
            self._losses.append(loss)


def losses_before(events: Iterable[Event], step: int) -> list[float]:
    """The losses with which a `LossWatch` continues after the checkpoint of `step`: the last ones that led to it, without
    skipped steps. `events` are those of a run, in order; only `TYPES` matter."""
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
