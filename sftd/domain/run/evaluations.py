"""Decisions on evaluations: which commands are allowed, and what a daemon records."""

from __future__ import annotations

from sftd.domain.errors import Problem, Refused, quote
from sftd.domain.log import events as e
from sftd.domain.run.decisions import refuse_removed
from sftd.domain.run.state import CheckpointInfo, EvaluationState, Run

# An evaluation that was lost or killed starts again once.
_MOST_TRIES = 2
_NOT_ITS_FAULT = ("lost", "killed")


def checkpoint_of(run: Run, step: int) -> CheckpointInfo | None:
    """The checkpoint of a step."""
    return next((c for c in run.checkpoints if c.step == step), None)


def request(run: Run, step: int | None, name: str | None, by: str) -> tuple[int, list[e.EvaluationRequested]]:
    """Request the evaluation `name`, or all of the spec, of the checkpoint of `step`; None is the timeline's newest. One that
    waits or runs is not requested again. Returns the step and the requests. Raises `Refused`."""
    refuse_removed(run)
    names = [evaluation.name for evaluation in run.spec.evaluation]
    if not names:
        fix = "submit a run with `evaluation`; a resume may add it"
        raise Refused(Problem(run.run_id, "its config has no evaluation", fix))
    if name is not None and name not in names:
        raise Refused(
            Problem("NAME", f"{run.run_id} has no evaluation {quote(name)}", f"use {', '.join(names)}")
        )
    timeline = [c.step for c in run.checkpoints if not c.superseded]
    chosen = step if step is not None else max(timeline, default=None)
    if chosen is None or checkpoint_of(run, chosen) is None:
        have = ", ".join(str(c.step) for c in run.checkpoints)
        what = "has no checkpoint" if step is None else f"has no checkpoint of step {step}"
        raise Refused(Problem(run.run_id, what, f"use --step with one of {have}" if have else "wait for one"))
    known = {x.name for x in run.evaluations if x.step == chosen and x.is_open}
    return chosen, [
        e.EvaluationRequested(name=wanted, step=chosen, by=by)
        for wanted in ([name] if name is not None else names)
        if wanted not in known
    ]


def failed(state: EvaluationState, cause: str, message: str) -> e.EvaluationFailed:
    """The end of a started evaluation without a result."""
    will_retry = cause in _NOT_ITS_FAULT and state.tries < _MOST_TRIES
    return e.EvaluationFailed(
        name=state.name, step=state.step, cause=cause, message=message, will_retry=will_retry
    )


def cancel(run: Run, step: int | None, name: str | None, by: str) -> list[e.EvaluationFailed]:
    """Give up evaluations that wait or run: all, or those of a step or a name."""
    return [
        e.EvaluationFailed(name=x.name, step=x.step, cause="cancelled", message=f"by {by}", will_retry=False)
        for x in run.evaluations
        if x.is_open and name in (None, x.name) and step in (None, x.step)
    ]
