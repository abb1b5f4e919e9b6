"""Early stopping and the best checkpoints: pure functions of a metric's values in the log."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.state import ACTIVE, Run
from sftd.domain.spec.sections import EarlyStop

# The event types that `before` reads.
TYPES = e.names(e.AttemptClaimed, e.CheckpointPublished, e.ValidationCompleted)
Value = tuple[int, float]


class Patience(msgspec.Struct, frozen=True):
    """The best value of a metric so far, None without a finite one, the step that has it, and the number of values since then
    that did not improve on it."""

    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def after(self, rule: EarlyStop, step: int, value: float) -> Patience:
        """The patience after one more value. A value improves if it is better by more than `min_delta`; NaN never does."""
        sign = 1.0 if rule.mode == "max" else -1.0
        if math.isfinite(value) and (self.best is None or sign * (value - self.best) > rule.min_delta):
            return Patience(value, step)
        return msgspec.structs.replace(self, waited=self.waited + 1)

    def stop(self, rule: EarlyStop, step: int) -> e.StoppedEarly | None:
        """The end of training after the value of `step`, if patience ran out."""
        if self.waited < rule.patience:
            return None
        return e.StoppedEarly(
            step=step, metric=rule.metric, best=self.best, best_step=self.best_step, patience=rule.patience
        )


def patience(rule: EarlyStop, values: Iterable[Value]) -> Patience:
    """The patience after some (step, value), in order."""
    state = Patience()
    for step, value in values:
        state = state.after(rule, step, value)
    return state


def stop_of(rule: EarlyStop, values: Iterable[Value]) -> e.StoppedEarly | None:
    """The first stop within some (step, value), in order."""
    state = Patience()
    for step, value in values:
        state = state.after(rule, step, value)
        if (stop := state.stop(rule, step)) is not None:
            return stop
    return None


def before(events: Iterable[e.Event], run: Run, step: int) -> Patience:
    """The patience with which an attempt of `run` continues after the checkpoint of `step`, of the metric `val_loss`. `events` are
    those of the run, in order; only `TYPES` matter."""
    rule, values, saved = run.spec.trainer.early_stop, list[Value](), dict[int, list[Value]]()
    if rule is None or rule.metric != "val_loss":
        return Patience()
    for event in events:
        match event:
            case e.ValidationCompleted(step=at, loss=loss):
                values.append((at, loss))
                if at in saved:
                    # A stop saves the checkpoint before the validation.
                    saved[at] = list(values)
            case e.CheckpointPublished(step=at):
                saved[at] = [value for value in values if value[0] <= at]
            case e.AttemptClaimed(from_step=at):
                values = _leading_to(at, values, saved)
    return patience(rule, (v for v in _leading_to(step, values, saved) if v[0] > run.patience_from))


def _leading_to(step: int, values: list[Value], saved: dict[int, list[Value]]) -> list[Value]:
    return list(saved[step]) if step in saved else [value for value in values if value[0] <= step]


def counts_from(run: Run, step: int) -> int:
    """The step after which values count once `run` is resumed after `step`. After an early stop they count anew: otherwise the
    next value would end the run again."""
    has_stopped = run.status == "succeeded" and run.stopped_early is not None
    return step if has_stopped else run.patience_from


def values_of(run: Run, metric: str) -> list[Value]:
    """(step, value) of a metric of the run's timeline, by step: `val_loss` at its checkpoints, or NAME/METRIC of an
    evaluation."""
    if metric == "val_loss":
        return [
            (c.step, c.val_loss)
            for c in run.checkpoints
            if isinstance(c.val_loss, float) and not c.superseded
        ]
    name, _, key = metric.partition("/")
    return [(x.step, x.metrics[key]) for x in run.evaluations if x.name == name and key in x.metrics]


def evaluated(run: Run) -> list[e.Event]:
    """The events after an evaluation of `run` was recorded: none, or the end of training if patience ran out. An evaluation whose
    predecessors have no result yet does not count yet, so the order in which evaluations end does not matter."""
    rule = run.spec.trainer.early_stop
    if rule is None or run.status not in ACTIVE or run.stopped_early is not None:
        return []
    name = rule.metric.partition("/")[0]
    is_open = (x.step for x in run.evaluations if x.name == name and x.is_open)
    first_open = min(is_open, default=math.inf)
    stop = stop_of(
        rule,
        (v for v in values_of(run, rule.metric) if run.patience_from < v[0] < first_open),
    )
    if stop is None or rule.metric == "val_loss":
        return []
    if run.status == "stopping":
        return [stop]
    return [stop, e.StopRequested(by="sftd", reason=stop.reason, then="paused")]
