"""The fold: the effect of each event on the state of a run."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import msgspec

from sftd.domain.data.facts import SourceFacts
from sftd.domain.errors import UnknownEvent
from sftd.domain.log import events as e
from sftd.domain.log.codec import json_float
from sftd.domain.log.timeline import order_after_skip
from sftd.domain.run import early_stop, exactness
from sftd.domain.run.folds import evaluations
from sftd.domain.run.folds.files import FILES
from sftd.domain.run.folds.stops import HALTS, NO_STOP
from sftd.domain.run.state import CheckpointInfo, ForkPoint, Replay, Run, Saving, Status, Validation
from sftd.domain.spec.spec import OrderStart, Spec


def fold(run: Run, recorded: list[e.Recorded]) -> Run:
    """Apply events in order."""
    for r in recorded:
        run = evolve(run, r)
    return run


def evolve(run: Run, recorded: e.Recorded) -> Run:
    """The run after one more event. Accepts events that today's decisions would refuse."""
    run = _apply(recorded.event, run, recorded)
    return msgspec.structs.replace(run, version=recorded.version, updated_at=recorded.occurred_at)


_set = msgspec.structs.replace


@singledispatch
def _apply(event: e.Event, run: Run, recorded: e.Recorded) -> Run:
    return run


@_apply.register(e.RunSubmitted)
def _(event: e.RunSubmitted, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        run,
        spec=_spec(event.spec),
        spec_digest=event.spec_digest,
        user=event.user,
        train_digest=_digest(event.data, "train"),
        val_digest=_digest(event.data, "val"),
        sources=msgspec.convert((event.data.get("train") or {}).get("sources", ()), tuple[SourceFacts, ...]),
        planned_steps=event.planned_steps,
        submitted_at=recorded.occurred_at,
    )


@_apply.register(e.RunForked)
def _(event: e.RunForked, run: Run, recorded: e.Recorded) -> Run:
    start: tuple[CheckpointInfo, ...] = ()
    order = (OrderStart(event.step, event.sample),)
    if event.checkpoint is not None:
        start = (
            CheckpointInfo(
                step=event.step,
                path=event.checkpoint,
                bytes=event.bytes,
                manifest_digest=event.manifest_digest or "",
                tokens_total=event.tokens_total,
                version=recorded.version,
                published_at=recorded.occurred_at,
                is_parents=True,
                order=order,
            ),
        )
    return _set(
        run,
        fork=ForkPoint(event.parent, event.step, event.tokens_total, event.sample, event.mixture),
        order=order,
        step=event.step,
        highest_step=event.step,
        attempt_base=event.step,
        tokens_counted=event.tokens_total,
        tokens_reported=event.tokens_total,
        checkpoints=start,
    )


@_apply.register(e.ModelLoaded)
def _(event: e.ModelLoaded, run: Run, recorded: e.Recorded) -> Run:
    return exactness.at_load(run, event)


def _spec(written: dict[str, Any]) -> Spec:
    """The spec of an event, without keys that a newer sftd added. Raises `UnknownEvent` if it cannot be read."""
    try:
        return msgspec.convert(_known(written, Spec), Spec)
    except msgspec.ValidationError as error:
        raise UnknownEvent(
            f"The log holds a spec that this sftd cannot read ({error}): a newer one wrote it."
        ) from None


def _known(written: dict[str, Any], section: type[msgspec.Struct]) -> dict[str, Any]:
    kept = {}
    for field in msgspec.structs.fields(section):
        if field.name in written:
            value, kind = written[field.name], field.type
            is_section = (
                isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict)
            )
            kept[field.name] = _known(value, kind) if is_section else value
    return kept


def _digest(data: dict[str, Any], part: str) -> str:
    return str((data.get(part) or {}).get("digest", ""))


@_apply.register(e.AttemptClaimed)
def _(event: e.AttemptClaimed, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        # The rewind is part of the claim, so that an attempt that dies before it resumes keeps the requested step.
        _rewind(run, event.from_step),
        loose_until=exactness.at_claim(run, event.from_step),
        status="starting",
        attempt=recorded.attempt or run.attempt + 1,
        daemon=event.daemon,
        job_report=None,
        retry_at=None,
        resume_from=None,
        attempt_base=run.highest_step,
        attempt_progressed=False,
        started_at=run.started_at or recorded.occurred_at,
        ended_at=None,
        cause=None,
        message=None,
        stopped_early=None,
    )


@_apply.register(e.AttemptAdopted)
def _(event: e.AttemptAdopted, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, daemon=event.daemon)


@_apply.register(e.TrainingResumed)
def _(event: e.TrainingResumed, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        run,
        step=event.step,
        tokens_reported=event.tokens_total,
        checkpoints=tuple(_set(c, verified=True) if c.step == event.step else c for c in run.checkpoints),
    )


def _rewind(run: Run, step: int) -> Run:
    """The run after its timeline goes back to the checkpoint of `step` (0 is the pretrained model)."""
    start = run.fork.tokens_total if run.fork and run.fork.step == step else 0
    tokens = next((c.tokens_total for c in run.checkpoints if c.step == step), start)
    kept = [v for v in (run.first_validation, run.last_validation) if v is not None and v.step <= step]
    kept += [
        Validation(c.step, c.val_loss) for c in run.checkpoints if c.val_loss is not None and c.step <= step
    ]
    return _set(
        run,
        step=step,
        # The values of a step that the timeline no longer has do not apply to `step`.
        loss=run.loss if step >= run.step else None,
        lr=run.lr if step >= run.step else None,
        order=run.order_behind(step),
        tokens_counted=tokens,
        tokens_reported=tokens,
        first_validation=min(kept, key=lambda v: v.step, default=None),
        last_validation=max(kept, key=lambda v: v.step, default=None),
        best_validation=min(
            (v for v in kept if isinstance(v.loss, float)), key=lambda v: (v.loss, v.step), default=None
        ),
        # A superseded checkpoint that the user chose is in the timeline again, so a retry also starts there.
        checkpoints=tuple(
            _set(c, superseded=c.step > step) if c.step >= step else c for c in run.checkpoints
        ),
        evaluations=evaluations.up_to(run, step),
    )


@_apply.register(e.StepCompleted)
def _(event: e.StepCompleted, run: Run, recorded: e.Recorded) -> Run:
    redone = event.step <= run.highest_step
    return _set(
        run,
        status="running" if run.status == "starting" else run.status,
        step=event.step,
        loose_until=exactness.at_step(run, event.step),
        loss=json_float(event.loss),
        lr=event.lr,
        tokens_counted=run.tokens_counted + event.tokens,
        tokens_reported=event.tokens_total,
        seconds_per_step=_pace(run, event.seconds),
        tokens_per_second=event.tokens_real / event.seconds if event.seconds > 0 else None,
        highest_step=max(run.highest_step, event.step),
        steps_redone=run.steps_redone + redone,
        attempt_progressed=run.attempt_progressed
        or event.step - run.attempt_base >= run.spec.launch.min_progress_steps,
    )


def _pace(run: Run, seconds: float) -> float:
    """Smoothed seconds per step. The first step of an attempt loads kernels and fills caches, so it counts only until another
    step is known."""
    known, since_load = run.seconds_per_step, run.step - run.began_at
    if known is None or (run.attempt == 1 and since_load == 1):
        return seconds
    return known if since_load == 0 else 0.8 * known + 0.2 * seconds


@_apply.register(e.ValidationCompleted)
def _(event: e.ValidationCompleted, run: Run, recorded: e.Recorded) -> Run:
    v = Validation(event.step, json_float(event.loss))
    best = run.best_validation
    better = math.isfinite(event.loss) and (best is None or event.loss < float(best.loss))
    return _set(
        run,
        first_validation=run.first_validation or v,
        last_validation=v,
        best_validation=v if better else best,
        # A stop saves the checkpoint before the validation.
        checkpoints=tuple(
            _set(c, val_loss=v.loss)
            if c.step == v.step and not (c.superseded or c.is_parents) and c.val_loss is None
            else c
            for c in run.checkpoints
        ),
    )


@_apply.register(e.CheckpointStarted)
def _(event: e.CheckpointStarted, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, saving=_saving(run, event.step))


def _saving(run: Run, step: int) -> Saving:
    validation = run.last_validation
    val_loss = validation.loss if validation and validation.step == step else None
    return Saving(step, run.tokens_counted, val_loss)


@_apply.register(e.CheckpointPublished)
def _(event: e.CheckpointPublished, run: Run, recorded: e.Recorded) -> Run:
    saved = run.saving if run.saving and run.saving.step == event.step else _saving(run, event.step)
    pins = dict(run.rejected_pins)
    forks = next((c.forks for c in run.checkpoints if c.step == event.step), pins.pop(event.step, ()))
    info = CheckpointInfo(
        step=event.step,
        path=event.path,
        bytes=event.bytes,
        manifest_digest=event.manifest_digest,
        tokens_total=saved.tokens_total,
        version=recorded.version,
        published_at=recorded.occurred_at,
        val_loss=saved.val_loss,
        forks=forks,
        order=run.order,
    )
    others = tuple(c for c in run.checkpoints if c.step != event.step)
    return _set(
        run,
        checkpoints=tuple(sorted((*others, info), key=lambda c: c.step)),
        evaluations=evaluations.due(run, event.step, event.manifest_digest, recorded.occurred_at),
        rejected_pins=pins,
        attempt_progressed=run.attempt_progressed
        or event.step > run.attempt_base
        or all(c.superseded for c in run.checkpoints if c.step == event.step),
    )


@_apply.register(e.CheckpointRejected)
def _(event: e.CheckpointRejected, run: Run, recorded: e.Recorded) -> Run:
    pins = {c.step: c.forks for c in run.checkpoints if c.step == event.step and c.forks}
    return _set(
        run,
        checkpoints=tuple(c for c in run.checkpoints if c.step != event.step),
        evaluations=evaluations.without(run, event.step),
        rejected_pins=run.rejected_pins | pins,
        # Counts as progress: the next attempt starts from another checkpoint, and there is a finite number of them.
        attempt_progressed=run.attempt_progressed or any(c.step == event.step for c in run.checkpoints),
    )


@_apply.register(e.AnomalyDetected)
def _(event: e.AnomalyDetected, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, anomalies=run.anomalies + 1)


@_apply.register(e.SamplesSkipped)
def _(event: e.SamplesSkipped, run: Run, recorded: e.Recorded) -> Run:
    order = order_after_skip(run.order, event)
    return _set(
        run,
        order=order,
        # An attempt that begins at this checkpoint skips the samples too.
        checkpoints=tuple(_set(c, order=order) if c.step == event.step else c for c in run.checkpoints),
    )


@_apply.register(e.ReplayVerified)
def _(event: e.ReplayVerified, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, last_replay=Replay(event.from_step, event.to_step, None, recorded.occurred_at))


@_apply.register(e.ReplayDiverged)
def _(event: e.ReplayDiverged, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, last_replay=Replay(event.from_step, event.to_step, event.step, recorded.occurred_at))


@_apply.register(e.StoppedEarly)
def _(event: e.StoppedEarly, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, stopped_early=event)


@_apply.register(e.ResumeRequested)
def _(event: e.ResumeRequested, run: Run, recorded: e.Recorded) -> Run:
    begin = run.step if event.from_step is None else event.from_step
    run = _set(run, stopped_early=None, patience_from=early_stop.counts_from(run, begin))
    if event.spec is not None:
        run = _set(
            run,
            spec=_spec(event.spec),
            spec_digest=event.spec_digest or run.spec_digest,
            planned_steps=event.planned_steps or run.planned_steps,
        )
    return _set(
        run,
        status="queued",
        resume_from=event.from_step,
        **NO_STOP,
        retry_at=None,
        ended_at=None,
        fruitless_attempts=0,
        cause=None,
        message=None,
    )


def _attempt_ended(run: Run, cause: str, message: str, retry_at: e.Micros | None) -> Run:
    return _set(
        run,
        # Without retry_at, the next event ends the run.
        status="retrying",
        retry_at=retry_at,
        daemon=None,
        cause=cause,
        message=message,
        fruitless_attempts=0 if run.attempt_progressed else run.fruitless_attempts + 1,
    )


@_apply.register(e.AttemptFailed)
def _(event: e.AttemptFailed, run: Run, recorded: e.Recorded) -> Run:
    return _attempt_ended(run, event.cause, event.message, event.retry_at)


@_apply.register(e.AttemptLost)
def _(event: e.AttemptLost, run: Run, recorded: e.Recorded) -> Run:
    return _attempt_ended(run, "lost", event.message, event.retry_at)


def _ended(run: Run, status: Status, recorded: e.Recorded) -> Run:
    return _set(run, status=status, ended_at=recorded.occurred_at, daemon=None, retry_at=None)


@_apply.register(e.RunSucceeded)
def _(event: e.RunSucceeded, run: Run, recorded: e.Recorded) -> Run:
    cause = "stopped early" if event.reason else None
    return _set(_ended(run, "succeeded", recorded), cause=cause, message=event.reason or None)


@_apply.register(e.RunFailed)
def _(event: e.RunFailed, run: Run, recorded: e.Recorded) -> Run:
    return _set(_ended(run, "failed", recorded), cause=event.cause, message=event.message)


@_apply.register(e.RunCancelled)
def _(event: e.RunCancelled, run: Run, recorded: e.Recorded) -> Run:
    return _ended(run, "cancelled", recorded)


for _type, _fold in (HALTS | FILES | evaluations.EVALUATIONS).items():
    _apply.register(_type, _fold)
