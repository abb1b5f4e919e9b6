"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math

from sftd.domain.spec import Spec


def learning_rate(step: int, spec: Spec, planned_steps: int) -> float:
    """Learning rate of 0-based `step` out of `planned_steps`.

    Linear warm-up over W steps: peak · (step + 1) / W, so that the first step already learns. Then, with
    t = (step − W) / (planned_steps − W) and the floor f = peak · min_lr_ratio:
    constant: peak; linear: f + (peak − f) · (1 − t); cosine: f + (peak − f) · (1 + cos πt) / 2.
    The first step after warm-up has the peak; the floor would be reached one step after the last.
    """
    peak = spec.optimizer.lr
    warmup = spec.warmup_steps(planned_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if spec.scheduler.type == "constant":
        return peak
    floor = peak * spec.scheduler.min_lr_ratio
    progress = min(1.0, (step - warmup) / max(1, planned_steps - warmup))
    share = 1.0 - progress if spec.scheduler.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * share
