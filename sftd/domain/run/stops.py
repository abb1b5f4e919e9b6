"""Decisions that stop a run without ending it: hold, release, pause, preempt; and the events of stopped attempts."""

from __future__ import annotations

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.run.failures import Interruption
from sftd.domain.run.state import ACTIVE, ENDED, WAITING, Run


def hold(run: Run, by: str, reason: str = "") -> list[e.Event]:
    """Keep a waiting run from starting until it is released."""
    if run.status == "held":
        return []
    if run.status in ACTIVE:
        raise Refused(_problem(run, f"`sftd pause {run.run_id}` stops it with a checkpoint"))
    if run.status not in WAITING:
        raise Refused(_problem(run, "only a waiting run can be held"))
    return [e.RunHeld(by=by, reason=reason)]


def release(run: Run, by: str) -> list[e.Event]:
    """Let a held run wait for its turn again, in its old place."""
    if run.status != "held":
        fix = f"use `sftd resume {run.run_id}`" if run.status == "paused" else "only a held run is released"
        raise Refused(_problem(run, fix))
    return [e.RunReleased(by=by)]


def pause(run: Run, by: str, reason: str = "") -> list[e.Event]:
    """Stop an active run at its next step boundary, with a checkpoint, until it is resumed."""
    if run.status == "paused" or (run.status == "stopping" and run.stop_then == "paused"):
        return []
    if run.status in WAITING:
        raise Refused(_problem(run, f"`sftd hold {run.run_id}` keeps it from starting"))
    if run.status == "stopping" and run.stop_then == "cancelled":
        what = "is being cancelled"
        raise Refused(Problem(run.run_id, what, "`sftd resume` continues it once it has stopped"))
    if run.status not in ACTIVE:
        raise Refused(_problem(run, "only a run that is being trained can be paused"))
    return [e.StopRequested(by=by, reason=reason, then="paused")]


def preempt(run: Run, by_run: str, priority: int) -> list[e.Event]:
    """Stop a run to make room for `by_run`; it then waits in its old place. No event if it is already stopping."""
    if run.status not in ACTIVE or run.status == "stopping":
        return []
    reason = f"makes room for {by_run}, which has priority {priority}"
    return [e.StopRequested(by="sftd", reason=reason, then="queued", preempted_by=by_run)]


def stopped(run: Run, by: str) -> e.Event:
    """The event that ends a stopped attempt."""
    start = run.restart_checkpoint
    step = start.step if start else 0
    match run.stop_then:
        case "paused":
            return e.AttemptPaused(step=step, by=by)
        case "queued":
            return e.AttemptPreempted(step=step, by_run=run.preempted_by or "")
    return e.RunCancelled(by=by)


def interrupted(run: Run, interruption: Interruption) -> e.Event | None:
    """The event of an attempt that its resource manager ended. None if it counts as a failure: without progress within the
    time limit, the next attempt would hit the limit too."""
    start = run.restart_checkpoint
    step = start.step if start else 0
    if interruption.kind == "cancelled":
        return e.AttemptPaused(step=step, by=interruption.message)
    if interruption.kind == "time limit" and not run.attempt_progressed:
        return None
    return e.AttemptPreempted(step=step, by_run="", reason=interruption.message)


def _problem(run: Run, fix: str) -> Problem:
    what = run.how_it_ended if run.status in ENDED else f"is {run.status}"
    return Problem(run.run_id, what, fix)
