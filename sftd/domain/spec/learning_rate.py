"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math
from typing import assert_never

from sftd.domain.spec.spec import Spec


def learning_rate(step: int, spec: Spec, planned_steps: int) -> float:
    """Learning rate of 0-based `step` out of `planned_steps`.

    Linear warm-up over W steps: peak · (step + 1) / W, so that the first step has a rate above 0. Then, with
    t = (step − W) / (planned_steps − W) and the floor f = peak · min_lr_ratio:
    constant: peak; linear: f + (peak − f) · (1 − t); cosine: f + (peak − f) · (1 + cos πt) / 2; wsd (warm-up, stable,
    decay): peak until the last D = decay_ratio · planned_steps steps, over which it falls as linear does.
    The first step after warm-up has the peak; the floor would be reached one step after the last.
    """
    peak = spec.optimizer.lr
    warmup = spec.warmup_steps(planned_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    stable = warmup
    if spec.scheduler.type == "wsd":
        stable = max(warmup, planned_steps - round(spec.scheduler.decay_ratio * planned_steps))
    progress = min(1.0, max(0, step - stable) / max(1, planned_steps - stable))
    match spec.scheduler.type:
        case "constant":
            return peak
        case "linear" | "wsd":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case unknown:
            assert_never(unknown)
    floor = peak * spec.scheduler.min_lr_ratio
    return floor + (peak - floor) * share
