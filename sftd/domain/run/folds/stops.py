"""The fold for events of stopping and waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.state import ACTIVE, Run, Status

_set = msgspec.structs.replace
# The fields of a run without a stop request.
NO_STOP: dict[str, Any] = {
    "stop_by": None,
    "stop_reason": "",
    "stop_then": "cancelled",
    "stop_now": False,
    "preempted_by": None,
}


def _stop_requested(event: e.StopRequested, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        run,
        stop_by=event.by,
        stop_reason=event.reason,
        stop_then=event.then,
        stop_now=event.now,
        preempted_by=event.preempted_by,
        status="stopping" if run.status in ACTIVE else run.status,
    )


def _deferred(event: e.RunDeferred, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, after=tuple(event.after))


def _joined(event: e.SweepJoined, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, sweep=event.sweep)


def _held(event: e.RunHeld, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, status="held")


def _released(event: e.RunReleased, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, status="queued" if run.retry_at is None else "retrying")


def _interrupted(run: Run, status: Status) -> Run:
    """The run after an intended stop of its attempt, which does not count towards a crash loop."""
    fruitless = 0 if run.attempt_progressed else run.fruitless_attempts
    return _set(run, status=status, daemon=None, fruitless_attempts=fruitless, **NO_STOP)


def _paused(event: e.AttemptPaused, run: Run, recorded: e.Recorded) -> Run:
    return _interrupted(run, "paused")


def _preempted(event: e.AttemptPreempted, run: Run, recorded: e.Recorded) -> Run:
    return _set(_interrupted(run, "queued"), preemptions=run.preemptions + 1)


def _job_reported(event: e.JobReported, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, job_report=event)


HALTS: dict[type[e.Event], Callable[..., Run]] = {
    e.StopRequested: _stop_requested,
    e.RunDeferred: _deferred,
    e.SweepJoined: _joined,
    e.RunHeld: _held,
    e.RunReleased: _released,
    e.AttemptPaused: _paused,
    e.AttemptPreempted: _preempted,
    e.JobReported: _job_reported,
}
