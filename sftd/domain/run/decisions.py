"""Decisions: the only place where commands become events. Each function takes the run's state and returns the events to
append, or raises `Refused`. Nothing is written here."""

from __future__ import annotations

import msgspec

from sftd.domain.data.facts import SourceFacts
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.errors import Problem, Refused, quote
from sftd.domain.log import events as e
from sftd.domain.queue.order import MAX_BACKOFF_SECONDS
from sftd.domain.run import stops, trajectory
from sftd.domain.run.failures import NOT_RETRIED, Failure, Interruption
from sftd.domain.run.state import ACTIVE, ENDED, WAITING, CheckpointInfo, Run
from sftd.domain.spec.on_resume import OnResume
from sftd.domain.spec.spec import Spec, spec_digest

MICROS = 1_000_000


class Proposal(msgspec.Struct, frozen=True):
    """The new spec for a resume or a fork, with the digests of its data files, and the sources of its mixture."""

    spec: Spec
    planned_steps: int
    train_digest: str
    val_digest: str
    sources: tuple[SourceFacts, ...] = ()


def backoff_seconds(fruitless_attempts: int, base_seconds: float) -> float:
    """Seconds before the next attempt: doubles with each attempt without progress, up to ten minutes."""
    return min(MAX_BACKOFF_SECONDS, base_seconds * 2.0 ** max(0, fruitless_attempts - 1))


def request_stop(run: Run, by: str, reason: str = "", *, now: bool = False) -> list[e.Event]:
    """Cancel: an active run ends after its attempt, which `now` kills; any other run ends at once."""
    if run.status in ENDED:
        raise Refused(Problem(run.run_id, f"{run.how_it_ended} already", "there is nothing to cancel"))
    stop = e.StopRequested(by=by, reason=reason, now=now)
    if run.status not in ACTIVE:
        return [stop, e.RunCancelled(by=by)]
    asked_already = run.status == "stopping" and run.stop_then == "cancelled" and run.stop_now >= now
    return [] if asked_already else [stop]


def abandon(run: Run, by: str) -> list[e.Event]:
    """End a run whose attempt no daemon can observe any more, on a user's request."""
    if run.status not in ACTIVE:
        raise Refused(
            Problem(
                run.run_id, f"is {run.status}: it has no active attempt", "use `sftd cancel` or `sftd resume`"
            )
        )
    return [e.AttemptLost(message=f"given up by {by}"), e.RunCancelled(by=by)]


def refuse_busy(run: Run) -> None:
    """Raises `Refused` unless the run waits for a retry, is paused or has ended."""
    if run.status in ACTIVE:
        raise Refused(
            Problem(run.run_id, f"is {run.status}", f"wait for it, or `sftd cancel {run.run_id}` first")
        )
    if run.status == "queued":
        raise Refused(
            Problem(run.run_id, "is queued already", "start a daemon with `sftd daemon` if none is running")
        )
    if run.status == "held":
        raise Refused(Problem(run.run_id, "is held", f"use `sftd release {run.run_id}`"))


def request_resume(
    run: Run, by: str, from_step: int | None, new: Proposal | None = None, instead: str = ""
) -> list[e.Event]:
    """Request another attempt, from the last published checkpoint or from `from_step` (0 is the pretrained model).

    `new` may change the spec only if the existing steps stay the same. `instead` is the command that forks the run with
    these changes.
    """
    refuse_busy(run)
    refuse_removed(run)
    planned = new.planned_steps if new else run.planned_steps
    if new and (problems := other_run(run, new)):
        problems[-1] = msgspec.structs.replace(problems[-1], fix=f"fork the run instead: {instead}")
        raise Refused(problems)
    if from_step is None and run.status == "succeeded" and planned == run.planned_steps:
        fix = f"train more with trainer.max_steps=N, or redo steps with --from-step ({_steps(run)})"
        raise Refused(Problem(run.run_id, "has succeeded: no steps are left", fix))
    start = _resume_start(run, from_step)
    if planned < start:
        what = f"{planned} steps are fewer than the {start} from which the run continues"
        raise Refused(Problem("trainer.max_steps", what, f"go back with --from-step ({_steps(run)})"))
    changes = trajectory.changes(run.spec, new.spec) if new else {}
    if not new or not changes:
        return [e.ResumeRequested(by=by, from_step=from_step)]
    return [
        e.ResumeRequested(
            by=by,
            from_step=from_step,
            changes=changes,
            spec=msgspec.to_builtins(new.spec),
            spec_digest=spec_digest(new.spec),
            planned_steps=planned,
        )
    ]


def refuse_removed(run: Run) -> None:
    """Raises `Refused` if a user removed the run's checkpoints."""
    if run.removed_at is not None:
        again = f"train it again as another run: `sftd fork {run.run_id} --from-step 0`"
        raise Refused(
            Problem(run.run_id, "was removed: its checkpoints are gone", "" if run.first_step else again)
        )


def without_missing(run: Run, from_step: int | None, missing: frozenset[int]) -> int | None:
    """The step to resume from if the checkpoints of the `missing` steps are gone: `from_step`, or without one the newest that
    is left. 0 is the pretrained model. Raises `Refused` if there is none."""
    left = [c.step for c in run.checkpoints if c.step not in missing and not (c.superseded or c.weights_only)]
    if from_step in missing and from_step is not None:
        what = f"the checkpoint of step {from_step} of {run.run_id} is gone from the disk"
        choices = [*([] if run.first_step else [0]), *left]
        fix = f"use one of {', '.join(map(str, choices))}" if choices else "put its folder back"
        raise Refused(Problem("--from-step", what, fix))
    newest = run.restart_checkpoint
    if from_step is not None or newest is None or newest.step not in missing:
        return from_step
    if not left and run.first_step:
        raise Refused(_no_start(run))
    return max(left, default=0)


def other_run(run: Run, new: Proposal) -> list[Problem]:
    """The changes of a spec that would have changed the existing steps of `run`. The caller adds the fix."""
    changes = trajectory.changes(run.spec, new.spec)
    guilty = trajectory.other_trajectory(
        run.spec,
        new.spec,
        steps=run.highest_step,
        old_planned=run.planned_steps,
        new_planned=new.planned_steps,
        anomalies=run.anomalies,
    )
    contents = {
        "data.train_files": (run.train_digest, new.train_digest),
        "data.sources": (run.sources, new.sources),
        "data.val_files": (run.val_digest, new.val_digest),
    }
    problems = []
    for key in guilty:
        # Data files are compared by content, not by path; a file may move from one source to another.
        if key not in changes or trajectory.is_files(key):
            continue
        was, now = changes[key]
        what = f"is {quote(now)}, but {run.run_id} has {quote(was)}"
        if trajectory.on_resume(key) is OnResume.LENGTH:
            what += f", and its {run.highest_step} steps used learning rates for {run.planned_steps} steps"
        problems.append(Problem(key, what))
    return problems or [
        Problem(key, f"the contents of the files changed since {run.run_id} began")
        for key, (was, now) in contents.items()
        if was != now
    ]


def _resume_start(run: Run, from_step: int | None) -> int:
    """The step after which a resumed run continues. Raises `Refused`."""
    if from_step is None:
        newest = max((c for c in run.checkpoints if not c.superseded), key=lambda c: c.step, default=None)
        if newest is None and run.first_step:
            raise Refused(_no_start(run))
        if newest is not None and newest.weights_only:
            raise Refused(_weights_only(run, newest))
        return newest.step if newest else 0
    if (from_step or run.first_step) and all(c.step != from_step for c in run.checkpoints):
        if not run.checkpoints and run.first_step:
            raise Refused(_no_start(run))
        what = f"{run.run_id} has no checkpoint of step {from_step}"
        raise Refused(Problem("--from-step", what, f"use one of {_steps(run)}"))
    if chosen := next((c for c in run.checkpoints if c.step == from_step and c.weights_only), None):
        raise Refused(_weights_only(run, chosen))
    pinned = [(name, c.step) for c in run.checkpoints if c.step > from_step for name in c.forks]
    if pinned:
        name, step = pinned[0]
        what = f"would overwrite step {step}, the fork point of {name}"
        raise Refused(Problem("--from-step", what, f"sftd fork {run.run_id} --from-step {from_step}"))
    return from_step


def _weights_only(run: Run, checkpoint: CheckpointInfo) -> Problem:
    what = f"its checkpoint of step {checkpoint.step} holds weights only: training cannot continue from it"
    again = f"start from another step with --from-step ({steps}), or " if (steps := _steps(run)) else ""
    fix = f"{again}train a new run from its model: `sftd export {run.run_id} --step {checkpoint.step}`"
    return Problem(run.run_id, what, fix)


def _no_start(run: Run) -> Problem:
    assert run.fork is not None
    what = (
        f"the checkpoint from which it was forked, step {run.fork.step} of {run.fork.parent}, cannot be used"
    )
    fix = f"fork again from another step: `sftd checkpoints {run.fork.parent}` lists them"
    return Problem(run.run_id, what, fix)


def _steps(run: Run) -> str:
    pretrained = [] if run.first_step else [0]
    return ", ".join(str(s) for s in (*pretrained, *(c.step for c in run.checkpoints if not c.weights_only)))


def fork_point(parent: Run, step: int | None) -> CheckpointInfo | None:
    """The checkpoint of the timeline from which a fork starts: that of `step`, or the newest if `step` is None. Returns None
    for step 0, the pretrained model. Raises `Refused`."""
    if step != 0 or parent.first_step:
        refuse_removed(parent)
    # A queued attempt that goes back supersedes the later checkpoints and may overwrite their folders.
    back = parent.resume_from if parent.status in WAITING else None
    timeline = [c for c in parent.checkpoints if not c.superseded and (back is None or c.step <= back)]
    whole = [c.step for c in timeline if not c.weights_only]
    have = ", ".join(str(s) for s in (*([] if parent.first_step else [0]), *whole))
    if step is None:
        if not timeline:
            fix = "wait until it has saved one (trainer.save_interval)" + (
                "" if parent.first_step else ", or start from the pretrained model: --from-step 0"
            )
            raise Refused(Problem(parent.run_id, "has no published checkpoint", fix))
        step = timeline[-1].step
    if step == 0 and not parent.first_step:
        return None
    found = next((c for c in timeline if c.step == step), None)
    if found is None:
        superseded = any(c.step == step for c in parent.checkpoints)
        what = f"the checkpoint of step {step} of {parent.run_id} " + (
            "is superseded: a later attempt continued from an earlier step" if superseded else "is missing"
        )
        raise Refused(Problem("--from-step", what, f"use one of {have}"))
    if found.weights_only:
        raise Refused(_weights_only(parent, found))
    return found


def remove(run: Run, by: str, freed_bytes: int) -> list[e.Event]:
    """Remove the files of an ended run, and hide it. Raises `Refused` if it is active, removed or needed by a fork."""
    if run.removed_at is not None:
        raise Refused(Problem(run.run_id, "was removed already", "`sftd ls --removed` lists such runs"))
    if run.status not in ENDED:
        raise Refused(Problem(run.run_id, f"is {run.status}", f"`sftd cancel {run.run_id}` first"))
    for step, forks in run.pins.items():
        what = f"its checkpoint of step {step} is where {', '.join(forks)} starts"
        raise Refused(Problem(run.run_id, what, f"remove that first: `sftd rm {' '.join(forks)}`"))
    gone = [
        e.CheckpointDeleted(step=c.step, path=c.path, bytes=c.bytes, reason="removed")
        for c in run.checkpoints
        if not c.is_parents
    ]
    return [*gone, e.RunRemoved(by=by, freed_bytes=freed_bytes)]


def fork(parent: Run, by: str, step: int | None, new: Proposal) -> e.RunForked:
    """Start another run after `step` of `parent`, with another spec. Steps count from the parent's first step. Raises
    `Refused`."""
    point = fork_point(parent, step)
    start = point.step if point else 0
    if new.planned_steps <= start:
        what = f"{new.planned_steps} steps, but the fork begins after step {start} of {parent.run_id}"
        fix = f"steps count from the parent's first: trainer.max_steps={start + max(1, new.planned_steps)}"
        raise Refused(Problem("trainer.max_steps", what, fix))
    order, mixture = trajectory.forked_order(parent, start, new.spec, new.train_digest, new.sources)
    return e.RunForked(
        parent=parent.run_id,
        step=start,
        sample=order.sample,
        mixture=mixture if mixture != MixtureStart() else None,
        checkpoint=point.path if point else None,
        manifest_digest=point.manifest_digest if point else None,
        bytes=point.bytes if point else 0,
        tokens_total=point.tokens_total if point else 0,
        changes=trajectory.changes(parent.spec, new.spec),
        by=by,
    )


def claim(run: Run, daemon: str, host: str) -> e.AttemptClaimed:
    """Claim the next attempt, from the run's restart checkpoint."""
    checkpoint = run.restart_checkpoint
    return e.AttemptClaimed(
        daemon=daemon,
        host=host,
        from_step=checkpoint.step if checkpoint else 0,
        checkpoint=checkpoint.path if checkpoint else None,
    )


def shortfall(run: Run) -> str | None:
    """What is missing for success: planned steps, counted tokens or the final checkpoint. None if nothing is missing."""
    if run.step != run.planned_steps:
        return f"{run.step} of {run.planned_steps} planned steps are in the log"
    if run.tokens_counted != run.tokens_reported:
        return f"the log's steps sum to {run.tokens_counted} trained tokens, but the trainer counted {run.tokens_reported}"
    if not any(c.step == run.planned_steps and not c.superseded for c in run.checkpoints):
        return "the final checkpoint was not published"
    return None


def end_attempt(
    run: Run,
    *,
    exit_code: int | None,
    failure: Failure,
    lost: bool,
    now: e.Micros,
    backoff_base: float,
    interruption: Interruption | None = None,
) -> list[e.Event]:
    """End an attempt whose processes are gone: the run succeeds, is cancelled, is retried, or fails.

    The log decides success, not the exit code. `failure` is the cause if the attempt did not finish its work.
    `interruption` is set if the resource manager ended the attempt.
    """
    missing = shortfall(run)
    if missing is None:
        return [_success(run)]
    if run.stop_by is not None:
        return [stops.stopped(run, run.stop_by)]
    if interruption is not None:
        interrupted = stops.interrupted(run, interruption)
        if interrupted is not None:
            return [interrupted]
        failure, lost = Failure("time limit", interruption.message, failure.evidence), False
    elif exit_code == 0:
        failure = Failure("incomplete", f"the trainer ended without an error, but {missing}")
    fruitless = 0 if run.attempt_progressed else run.fruitless_attempts + 1
    skipped = _skipped(run, failure)
    verdict: e.Event | None
    if run.first_step and run.restart_checkpoint is None:
        # A fork cannot restart from the pretrained model: that would be another run.
        verdict = e.RunFailed(cause=failure.cause, message=f"{_no_start(run).what}: {failure.message}")
    elif failure.cause in NOT_RETRIED and not skipped:
        verdict = e.RunFailed(cause=failure.cause, message=failure.message)
    elif fruitless > run.spec.launch.max_restarts:
        verdict = e.RunFailed(
            cause="crash loop" if fruitless > 1 else failure.cause,
            message=f"{fruitless} attempts in a row without a new checkpoint; the last: {failure.cause}: {failure.message}",
        )
    else:
        verdict = None
    retry_at = None if verdict else now + int(backoff_seconds(fruitless, backoff_base) * MICROS)
    ended = _attempt_ended(exit_code, failure, lost, retry_at)
    return [*skipped, ended, verdict] if verdict else [*skipped, ended]


def end_direct_attempt(
    run: Run, *, exit_code: int | None, failure: Failure, lost: bool, stopped_by: str | None
) -> list[e.Event]:
    """End an attempt that a user started without a daemon. There is no automatic retry.

    The log decides success, as in `end_attempt`. `stopped_by` is the user who stopped it at a step boundary.
    """
    missing = shortfall(run)
    if missing is None:
        return [_success(run)]
    if stopped_by is not None:
        stop = e.StopRequested(by=stopped_by, reason="the training command was interrupted")
        return [stop, e.RunCancelled(by=stopped_by)]
    if exit_code == 0:
        failure = Failure("incomplete", f"the trainer ended without an error, but {missing}")
    verdict = e.RunFailed(cause="lost" if lost else failure.cause, message=failure.message)
    return [*_skipped(run, failure), _attempt_ended(exit_code, failure, lost, None), verdict]


def _skipped(run: Run, failure: Failure) -> list[e.Event]:
    """With the policy `rollback`: the samples that the next attempt skips, so that it does not fail in the same way."""
    policies = {"not a number": run.spec.training.on_non_finite, "loss spike": run.spec.training.on_spike}
    if policies.get(failure.cause) != "rollback":
        return []
    checkpoint = run.restart_checkpoint
    back = checkpoint.step if checkpoint else run.first_step
    reason = f"{failure.cause}: {failure.message}"
    return [e.SamplesSkipped(step=back, sample=run.sample_position(run.step), reason=reason)]


def _success(run: Run) -> e.RunSucceeded:
    final = next(c for c in run.checkpoints if c.step == run.planned_steps)
    return e.RunSucceeded(steps=run.step, tokens=run.tokens_counted, final_checkpoint=final.path)


def _attempt_ended(
    exit_code: int | None, failure: Failure, lost: bool, retry_at: e.Micros | None
) -> e.AttemptFailed | e.AttemptLost:
    if lost:
        return e.AttemptLost(message=failure.message, retry_at=retry_at)
    return e.AttemptFailed(
        cause=failure.cause,
        message=failure.message,
        exit_code=exit_code,
        evidence=failure.evidence,
        retry_at=retry_at,
    )
