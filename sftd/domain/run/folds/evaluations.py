"""The fold for evaluations: which are due, run, done or failed, in the run's timeline."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.state import EvaluationState, Run

_set = msgspec.structs.replace


def due(run: Run, step: int, manifest_digest: str, at: e.Micros) -> tuple[EvaluationState, ...]:
    """`run.evaluations` after the checkpoint of `step` was published. One that has the result of the very same checkpoint is not
    due again."""
    kept = {
        (x.name, x.step)
        for x in run.evaluations
        if x.step == step and x.status == "done" and x.manifest_digest == manifest_digest
    }
    names = [
        x.name
        for x in run.spec.evaluation
        if x.is_due(step, run.planned_steps) and (x.name, step) not in kept
    ]
    others = [x for x in run.evaluations if x.step != step or (x.name, step) in kept]
    return _sorted(*others, *(EvaluationState(name, step, "pending", at) for name in names))


def _sorted(*states: EvaluationState) -> tuple[EvaluationState, ...]:
    return tuple(sorted(states, key=lambda x: (x.step, x.name)))


def up_to(run: Run, step: int) -> tuple[EvaluationState, ...]:
    """`run.evaluations` after the timeline goes back to `step`."""
    return tuple(x for x in run.evaluations if x.step <= step)


def without(run: Run, step: int) -> tuple[EvaluationState, ...]:
    """`run.evaluations` after the checkpoint of `step` is gone: results stay."""
    return tuple(x for x in run.evaluations if x.step != step or x.status in ("done", "failed"))


def _requested(event: e.EvaluationRequested, run: Run, recorded: e.Recorded) -> Run:
    if (known := run.evaluation_of(event.name, event.step)) and known.status == "running":
        return run
    others = [x for x in run.evaluations if (x.name, x.step) != (event.name, event.step)]
    asked = EvaluationState(event.name, event.step, "pending", recorded.occurred_at)
    return _set(run, evaluations=_sorted(*others, asked))


def _change(run: Run, name: str, step: int, change: Callable[[EvaluationState], EvaluationState]) -> Run:
    return _set(
        run,
        evaluations=tuple(change(x) if (x.name, x.step) == (name, step) else x for x in run.evaluations),
    )


def _started(event: e.EvaluationStarted, run: Run, recorded: e.Recorded) -> Run:
    def started(was: EvaluationState) -> EvaluationState:
        return _set(
            was,
            status="running",
            since=recorded.occurred_at,
            tries=was.tries + 1,
            started=recorded.version,
            daemon=event.daemon,
            manifest_digest=event.manifest_digest,
        )

    return _change(run, event.name, event.step, started)


def _interrupted(event: e.EvaluationInterrupted, run: Run, recorded: e.Recorded) -> Run:
    def waits(was: EvaluationState) -> EvaluationState:
        return _set(was, status="pending", since=recorded.occurred_at, tries=was.tries - 1, daemon="")

    return _change(run, event.name, event.step, waits)


def _completed(event: e.EvaluationCompleted, run: Run, recorded: e.Recorded) -> Run:
    def done(was: EvaluationState) -> EvaluationState:
        return _set(
            was,
            status="done",
            since=recorded.occurred_at,
            daemon="",
            metrics=event.metrics,
            questions=event.questions,
            questions_digest=event.questions_digest,
            seconds=event.seconds,
            answers=event.answers,
            manifest_digest=event.manifest_digest,
            message="",
        )

    return _change(run, event.name, event.step, done)


def _failed(event: e.EvaluationFailed, run: Run, recorded: e.Recorded) -> Run:
    def ended(was: EvaluationState) -> EvaluationState:
        return _set(
            was,
            status="pending" if event.will_retry else "failed",
            since=recorded.occurred_at,
            daemon="",
            message=f"{event.cause}: {event.message}",
        )

    return _change(run, event.name, event.step, ended)


EVALUATIONS: dict[type[e.Event], Callable[..., Run]] = {
    e.EvaluationRequested: _requested,
    e.EvaluationStarted: _started,
    e.EvaluationInterrupted: _interrupted,
    e.EvaluationCompleted: _completed,
    e.EvaluationFailed: _failed,
}
