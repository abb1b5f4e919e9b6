"""A run's state, the decisions taken on it and what retention keeps, as histories: a `Log` holds a run's events as the
database would."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.domain.errors import Refused
from sftd.domain.log import events
from sftd.domain.repro import steps as redo_steps
from sftd.domain.run import decisions, retention, stops
from sftd.domain.run import state as run_state
from sftd.domain.run.failures import NOT_RETRIED, Failure
from sftd.domain.run.fold import evolve, fold
from sftd.domain.run.state import ACTIVE, ENDED, Run
from sftd.domain.run.success import shortfall
from sftd.domain.spec.spec import OrderStart
from tests.builders.log.run_log import CRASH, TOKENS, Log, published, step, validated
from tests.builders.log.stories import STORY, live


def test_the_loss_of_a_superseded_step_is_not_the_runs() -> None:
    log = Log().claim().train(3).save().train(6).end()
    assert log.run.loss == 2.0
    log.claim()
    assert (log.run.step, log.run.loss, log.run.lr) == (3, None, None)
    log = Log().claim().train(6).save().end().claim()
    assert (log.run.step, log.run.loss) == (6, 2.0), "nothing is done again"


def test_the_first_step_of_an_attempt_is_not_its_pace() -> None:
    def paces(log: Log, *seconds: float) -> list[float | None]:
        said = []
        for taken in seconds:
            log.add(step(log.run.step + 1, seconds=taken))
            said.append(log.run.seconds_per_step)
        return said

    loaded = events.ModelLoaded(
        architecture="Llama", parameters=1, dtype="float32", device="cpu", seconds=1.0, environment={}
    )
    log = Log().claim().add(loaded)
    assert paces(log, 9.0, 1.0, 2.0) == [9.0, 1.0, pytest.approx(1.2)]
    log.save().end().claim().add(loaded)
    assert paces(log, 9.0, 2.2) == [pytest.approx(1.2), pytest.approx(1.4)]


def checkpoints(run: Run, *, superseded: bool = False) -> list[int]:
    return [c.step for c in run.checkpoints if c.superseded == superseded]


# The state.


def test_a_submitted_run_is_queued_with_its_spec() -> None:
    run = Log(planned=7, launch__priority=3).run
    assert (run.status, run.planned_steps, run.user, run.version) == ("queued", 7, "ada", 1)
    assert run.spec.launch.priority == 3
    assert run.submitted_at == run.updated_at == 1_000_000


def test_a_whole_run_succeeds() -> None:
    log = Log(planned=4).claim()
    assert (log.run.status, log.run.attempt, log.run.daemon) == ("starting", 1, "daemon")
    log.train(2)
    assert (log.run.status, log.run.step, log.run.tokens_counted) == ("running", 2, 200)
    assert (log.run.loss, log.run.lr, log.run.seconds_per_step) == (2.0, 1e-5, 0.5)
    assert log.run.tokens_per_second == 400.0
    log.train(4).save().end(exit_code=0)
    assert log.types[-1] == "RunSucceeded"
    assert (log.run.status, log.run.daemon, log.run.cause) == ("succeeded", None, None)
    assert log.run.ended_at == log.run.version * 1_000_000


def test_events_that_change_no_state_only_count() -> None:
    log = Log().claim()
    before = log.run
    log.add(
        events.ModelLoaded(
            architecture="a", parameters=1, dtype="f", device="cpu", seconds=1.0, environment={}
        ),
        events.SampleGenerated(step=0, prompt="p", text="t", tokens=1, stopped=True),
    )
    after = log.run
    assert msgspec.structs.replace(after, version=before.version, updated_at=before.updated_at) == before
    assert after.version == before.version + 2


def test_adoption_changes_the_daemon_and_nothing_else() -> None:
    log = Log().claim().train(2)
    log.add(events.AttemptAdopted(daemon="other", host="host", pid=1))
    assert (log.run.daemon, log.run.status, log.run.attempt) == ("other", "running", 1)


def test_losses_that_are_not_finite_are_kept_by_name() -> None:
    log = Log().claim().add(step(1, loss=float("nan")), validated(1, float("inf")))
    assert log.run.loss == "NaN"
    assert log.run.last_validation is not None
    assert log.run.last_validation.loss == "Infinity"
    assert log.run.best_validation is None
    encoded = msgspec.json.encode(log.run)
    assert msgspec.json.decode(encoded, type=Run) == log.run


def test_the_best_validation_is_the_lowest_finite_one() -> None:
    log = Log().claim()
    log.add(validated(0, 3.0), validated(1, float("nan")), validated(2, 2.0), validated(3, 2.5))
    found = (log.run.first_validation, log.run.best_validation, log.run.last_validation)
    assert [v.step for v in found if v] == [0, 2, 3]


# Crash, redo, resume.


def test_a_crash_goes_on_from_the_last_checkpoint() -> None:
    log = Log().claim().train(13, save_every=5).end()
    assert (log.run.status, log.run.cause, log.run.daemon) == ("retrying", "crash", None)
    assert log.run.retry_at == 15_000_000
    log.claim()
    claimed = log.recorded[-2].event
    assert isinstance(claimed, events.AttemptClaimed)
    assert (claimed.from_step, claimed.checkpoint) == (10, "/ck/step-10")
    assert (log.run.step, log.run.tokens_counted, log.run.tokens_reported) == (10, 1000, 1000)
    assert (log.run.attempt, log.run.cause, log.run.retry_at) == (2, None, None)
    log.train(15)
    assert (log.run.steps_redone, log.run.highest_step) == (3, 15)
    log.train(40).save().end(exit_code=0)
    assert log.run.status == "succeeded"


def test_a_crash_before_the_first_checkpoint_starts_from_the_pretrained_model() -> None:
    log = Log(planned=3).claim().train(2).end().claim()
    assert (log.run.step, log.run.tokens_counted) == (0, 0)
    log.train(3).save().end(exit_code=0)
    assert log.run.status == "succeeded"
    assert log.run.steps_redone == 2


def test_an_attempt_that_dies_before_it_resumes_does_not_lose_its_place() -> None:
    log = Log().claim().train(10, save_every=5)
    log.add(events.ResumeRequested(by="ada", from_step=5))
    log.add(decisions.claim(log.run, "d", "h")).end()
    assert checkpoints(log.run) == [5]
    assert decisions.claim(log.run, "d", "h").from_step == 5


def test_redone_steps_that_come_out_the_same_are_no_anomaly() -> None:
    for was, now in (
        (step(5, loss=float("nan")), step(5, loss=float("nan"), seconds=9.0)),
        (step(6), step(6, seconds=9.0, tokens_padded=1, epoch=3)),
    ):
        assert redo_steps.compare(was, now) == redo_steps.Redone(now.step, {}, is_exact=True)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 2.0000000000000004},
        {"loss": float("nan")},
        {"grad_norm": 2.0},
        {"lr": 1e-6},
        {"tokens": 99},
        {"samples_digest": "other"},
    ],
)
def test_redone_steps_that_differ_are_an_anomaly_with_both_numbers(change: dict[str, Any]) -> None:
    anomaly = redo_steps.compare(step(5), step(5, **change)).anomaly
    assert anomaly is not None
    ((name, value),) = change.items()
    assert anomaly.step == 5
    assert list(anomaly.detail) == [name]
    assert anomaly.detail[name]["recorded"] == getattr(step(5), name)
    assert repr(anomaly.detail[name]["redone"]) == repr(value)
    log = Log().claim().add(anomaly)
    assert (log.run.anomalies, log.run.status) == (1, "starting")


def test_a_zero_that_changes_its_sign_is_a_difference() -> None:
    """Bit for bit means that -0.0 is not 0.0."""
    assert redo_steps.compare(step(5, lr=0.0), step(5, lr=-0.0)).differs


def test_resuming_from_an_older_step_supersedes_what_follows() -> None:
    log = Log(planned=20).claim().train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 10))
    assert (log.run.status, log.run.resume_from, log.run.ended_at) == ("queued", 10, None)
    assert decisions.claim(log.run, "d", "h").checkpoint == "/ck/step-10"
    log.claim()
    assert checkpoints(log.run) == [5, 10]
    assert checkpoints(log.run, superseded=True) == [15, 20]
    assert (log.run.step, log.run.tokens_counted, log.run.resume_from) == (10, 1000, None)
    log.train(15).save()
    assert checkpoints(log.run) == [5, 10, 15]
    assert checkpoints(log.run, superseded=True) == [20]
    log.end().claim()
    assert log.run.step == 15
    log.train(20).save().end(exit_code=0)
    assert (log.run.status, log.run.steps_redone) == ("succeeded", 10)
    assert checkpoints(log.run, superseded=True) == []


def test_a_superseded_final_checkpoint_is_not_success() -> None:
    log = Log(planned=20).claim().train(20, save_every=10).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 10)).claim().train(20)
    assert shortfall(log.run) == "the final checkpoint was not published"
    log.end(exit_code=0)
    assert (log.run.status, log.run.cause) == ("retrying", "incomplete")


def test_resuming_from_zero_starts_from_the_pretrained_model() -> None:
    log = Log(planned=10).claim().train(10, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 0))
    claimed = decisions.claim(log.run, "d", "h")
    assert (claimed.from_step, claimed.checkpoint) == (0, None)
    log.claim()
    assert (log.run.step, log.run.tokens_counted, checkpoints(log.run)) == (0, 0, [])


def test_a_superseded_checkpoint_can_be_resumed_from_as_long_as_it_is_there() -> None:
    log = Log(planned=20).claim().train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 5)).claim().end()
    log.add(events.RunFailed(cause="x", message="y"), *decisions.request_resume(log.run, "ada", 15))
    claimed = decisions.claim(log.run, "d", "h")
    assert (claimed.from_step, claimed.checkpoint) == (15, "/ck/step-15")
    # And again, should the attempt die before it has come any further.
    log.claim().end()
    assert decisions.claim(log.run, "d", "h").from_step == 15


def test_a_superseded_final_checkpoint_that_was_asked_for_is_success() -> None:
    log = Log(planned=20).claim().train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 5)).claim().end()
    log.add(events.RunFailed(cause="x", message="y"), *decisions.request_resume(log.run, "ada", 20))
    assert log.claim().end(exit_code=0).run.status == "succeeded"


def _rolled_back() -> Log:
    """Went back from step 17 to 15, continued after the samples so far, to the end with checkpoints every 5 steps."""
    log = Log(planned=20, data__train_batch_size=4, checkpoint__keep_last=9).claim().train(17, save_every=5)
    log.end().add(events.SamplesSkipped(step=15, sample=68, reason="r"))
    log.claim().add(*(step(number, samples_digest=f"skipped{number}") for number in range(16, 21)))
    return log.save().end(exit_code=0)


def test_samples_that_were_left_out_belong_to_the_history_that_left_them_out() -> None:
    log = _rolled_back()
    assert log.run.status == "succeeded"
    assert log.run.order_start == OrderStart(15, 68)
    # Before the step from which they were left out, they are read again, by the next attempt already.
    log.add(*decisions.request_resume(log.run, "ada", 10))
    assert log.run.order_start == OrderStart()
    log.claim().train(12).end()
    # The superseded checkpoint is of the history that left them out.
    log.add(events.RunFailed(cause="x", message="y"), *decisions.request_resume(log.run, "ada", 20))
    assert log.run.order_start == OrderStart(15, 68)
    assert log.claim().run.order == (OrderStart(15, 68),)


def test_a_rejected_checkpoint_takes_what_was_left_out_behind_it_along() -> None:
    log = Log(data__train_batch_size=4).claim().train(17, save_every=5).end()
    log.add(events.SamplesSkipped(step=15, sample=68, reason="r"), decisions.claim(log.run, "d", "h"))
    log.add(events.CheckpointRejected(step=15, path="/ck/step-15", reason="r")).end()
    assert decisions.claim(log.run, "d", "h").from_step == 10
    assert log.run.order_start == OrderStart()


def test_steps_are_compared_with_those_that_read_the_same_samples() -> None:
    log = _rolled_back()

    def compared() -> dict[int, str]:
        found = redo_steps.steps_to_redo(r.event for r in log.recorded)
        return {n: was.samples_digest for n, was in found.items()}

    log.add(*decisions.request_resume(log.run, "ada", 15)).claim()
    assert [compared().get(n) for n in (15, 16, 20)] == [None, "skipped16", "skipped20"]
    log.end().add(events.RunFailed(cause="x", message="y"))
    log.add(*decisions.request_resume(log.run, "ada", 10)).claim()
    assert [compared().get(n) for n in (10, 15, 16, 17, 18)] == [None, "d15", "d16", "d17", None]
    log.train(17, save_every=5).end().add(events.SamplesSkipped(step=15, sample=68, reason="r"))
    log.claim()
    assert [compared().get(n) for n in (15, 16, 20)] == [None, "skipped16", "skipped20"]


def test_a_rejected_checkpoint_falls_back_to_the_one_before() -> None:
    log = Log().claim().train(12, save_every=5).end()
    log.add(decisions.claim(log.run, "d", "h"))
    log.add(events.CheckpointRejected(step=10, path="/ck/step-10", reason="digest"))
    log.end(Failure("bad checkpoint", "CheckpointInvalid"))
    assert log.run.status == "retrying"
    claimed = decisions.claim(log.run, "d", "h")
    assert (claimed.from_step, claimed.checkpoint) == (5, "/ck/step-5")
    log.claim()
    assert (log.run.step, log.run.tokens_counted) == (5, 500)


def test_a_rejected_only_checkpoint_falls_back_to_the_pretrained_model() -> None:
    log = Log().claim().train(5).save().end().claim()
    log.add(events.CheckpointRejected(step=5, path="/ck/step-5", reason="gone")).end()
    assert decisions.claim(log.run, "d", "h").checkpoint is None


# How an attempt ends.


def test_waits_double_up_to_ten_minutes() -> None:
    assert [decisions.backoff_seconds(n, 15.0) for n in (0, 1, 2, 3, 6, 7, 100)] == [
        15.0,
        15.0,
        30.0,
        60.0,
        480.0,
        600.0,
        600.0,
    ]


def test_however_many_checkpoints_are_damaged_the_newest_whole_one_is_used() -> None:
    log = Log().claim().train(30, save_every=5).end()
    for at in (30, 25, 20, 15, 10):
        assert decisions.claim(log.run, "d", "h").from_step == at
        log.claim().add(events.CheckpointRejected(step=at, path=f"/ck/step-{at}", reason="rot"))
        log.end(Failure("bad checkpoint", "rot"))
        assert log.run.status == "retrying"
    assert decisions.claim(log.run, "d", "h").from_step == 5


def test_attempts_without_progress_are_a_crash_loop() -> None:
    log = Log(launch__max_restarts=2).claim().train(3).end().claim().train(3).end()
    assert (log.run.status, log.run.fruitless_attempts) == ("retrying", 2)
    assert log.run.retry_at == 30_000_000
    log.claim().train(3).end()
    assert log.types[-2:] == ["AttemptFailed", "RunFailed"]
    assert (log.run.status, log.run.cause) == ("failed", "crash loop")
    assert log.run.message == (
        "3 attempts in a row without a new checkpoint; the last: crash: rank 0: ValueError: boom"
    )


def test_a_run_that_a_person_resumes_has_all_its_restarts_again() -> None:
    log = Log(launch__max_restarts=1).claim().train(3).end().claim().train(3).end()
    assert (log.run.status, log.run.cause) == ("failed", "crash loop")
    log.add(*decisions.request_resume(log.run, "ada", None))
    assert (log.run.status, log.run.fruitless_attempts, log.run.cause, log.run.message) == (
        "queued",
        0,
        None,
        None,
    )
    log.claim().train(3).end()
    assert log.run.status == "retrying", "one failure after a resume is not a crash loop"
    log.claim().train(3).end()
    assert log.run.status == "failed"


def test_a_new_checkpoint_is_progress() -> None:
    log = Log(launch__max_restarts=1)
    for until in (5, 10, 15, 20, 25):
        log.claim().train(until, save_every=5).end()
        assert (log.run.status, log.run.fruitless_attempts) == ("retrying", 0)


def test_enough_new_steps_are_progress() -> None:
    log = Log(launch__max_restarts=0, launch__min_progress_steps=3).claim().train(3).end()
    assert log.run.status == "retrying"
    log.claim().train(5).end()
    assert log.run.status == "failed"


def test_without_restarts_the_cause_is_told_as_it_is() -> None:
    log = Log(launch__max_restarts=0).claim().end()
    assert (log.run.status, log.run.cause) == ("failed", "crash")


@pytest.mark.parametrize("cause", sorted(NOT_RETRIED))
def test_what_would_fail_again_is_not_tried_again(cause: Any) -> None:
    log = Log().claim().train(20, save_every=5).end(Failure(cause, "m"))
    assert log.types[-2:] == ["AttemptFailed", "RunFailed"]
    assert (log.run.status, log.run.cause, log.run.message) == ("failed", cause, "m")


def test_a_lost_attempt_is_tried_again() -> None:
    log = Log().claim().train(3).end(Failure("lost", "the host restarted"), None, lost=True)
    assert log.types[-1] == "AttemptLost"
    assert (log.run.status, log.run.cause) == ("retrying", "lost")


def test_exit_code_zero_is_not_enough() -> None:
    log = Log().claim().train(39).end(exit_code=0)
    assert (log.run.status, log.run.cause) == ("retrying", "incomplete")
    assert "39 of 40 planned steps" in str(log.run.message)


def test_a_finished_run_has_succeeded_whatever_its_exit_code() -> None:
    assert Log(planned=5).claim().train(5).save().end(exit_code=1).run.status == "succeeded"


def test_tokens_that_do_not_add_up_are_not_success() -> None:
    log = Log(planned=2).claim().train(2, tokens=99).save()
    assert shortfall(log.run) == ("the log's steps sum to 198 trained tokens, but the trainer counted 200")


# Cancel and resume in every status.


def in_status(status: str) -> Log:
    log = Log(planned=10)
    if status == "queued":
        return log
    if status == "held":
        return log.add(*stops.hold(log.run, "ada"))
    log.claim()
    if status == "starting":
        return log
    log.train(6, save_every=5)
    match status:
        case "retrying":
            log.end()
        case "stopping":
            log.add(events.StopRequested(by="ada"))
        case "paused":
            log.add(*stops.pause(log.run, "ada")).end(exit_code=0)
        case "succeeded":
            log.train(10).save().end(exit_code=0)
        case "failed":
            log.end(Failure("user error", "m"))
        case "cancelled":
            log.add(events.StopRequested(by="ada")).end(exit_code=0)
    assert log.run.status == status
    return log


STATUSES = list(get_args(run_state.Status))


@pytest.mark.parametrize("status", STATUSES)
def test_cancel_in_every_status(status: str) -> None:
    log = in_status(status)
    if status in ENDED:
        with pytest.raises(Refused, match=f"(has|was) {status} already"):
            decisions.request_stop(log.run, "bob")
        return
    log.add(*decisions.request_stop(log.run, "bob", "why"))
    if status in ACTIVE:
        assert log.run.status == "stopping"
        assert decisions.request_stop(log.run, "bob") == []
        log.end(Failure("killed", "m"), 143)
    assert log.run.status == "cancelled"
    assert log.run.stop_by == ("ada" if status == "stopping" else "bob")


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("from_step", [None, 0, 5, 7])
def test_resume_in_every_status(status: str, from_step: int | None) -> None:
    log = in_status(status)
    allowed = status in {"retrying", "paused", "failed", "cancelled"} or (
        status == "succeeded" and from_step is not None
    )
    if allowed and from_step != 7:
        log.add(*decisions.request_resume(log.run, "bob", from_step))
        assert (log.run.status, log.run.stop_by, log.run.cause) == ("queued", None, None)
        assert decisions.claim(log.run, "d", "h").from_step == (5 if from_step is None else from_step)
        return
    with pytest.raises(Refused) as refused:
        decisions.request_resume(log.run, "bob", from_step)
    (problem,) = refused.value.problems
    assert problem.fix
    if allowed:
        assert "has no checkpoint of step 7" in problem.what
        assert problem.fix.startswith("use one of 0, 5")


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("deed", ["hold", "release", "pause"])
def test_hold_release_and_pause_in_every_status(status: str, deed: str) -> None:
    log = in_status(status)
    becomes = {
        ("hold", "queued"): "held",
        ("hold", "retrying"): "held",
        ("hold", "held"): "held",
        ("release", "held"): "queued",
        ("pause", "starting"): "stopping",
        ("pause", "running"): "stopping",
        ("pause", "paused"): "paused",
    }
    if (deed, status) in becomes:
        log.add(*getattr(stops, deed)(log.run, "bob"))
        assert log.run.status == becomes[deed, status]
        return
    with pytest.raises(Refused) as refused:
        getattr(stops, deed)(log.run, "bob")
    assert refused.value.problems[0].fix


def test_a_released_run_waits_out_its_back_off() -> None:
    log = in_status("retrying")
    retry_at = log.run.retry_at
    log.add(*stops.hold(log.run, "ada"), *stops.release(in_status("held").run, "ada"))
    assert (log.run.status, log.run.retry_at) == ("retrying", retry_at)


@pytest.mark.parametrize("then", ["paused", "queued"])
@pytest.mark.parametrize(
    ("failure", "exit_code", "lost"), [(CRASH, 1, False), (CRASH, 0, False), (CRASH, None, True)]
)
def test_a_stopped_attempt_is_no_failure_however_it_ends(
    then: str, failure: Failure, exit_code: int | None, lost: bool
) -> None:
    log = Log(launch__max_restarts=0).claim().train(6, save_every=5)
    stop = stops.pause(log.run, "ada") if then == "paused" else stops.preempt(log.run, "urgent", 5)
    log.add(*stop).end(failure, exit_code, lost=lost)
    assert (log.run.status, log.run.fruitless_attempts, log.run.cause) == (then, 0, None)
    ended = log.recorded[-1].event
    assert isinstance(ended, events.AttemptPaused | events.AttemptPreempted)
    assert ended.step == 5
    assert log.run.preemptions == (then == "queued")
    if then == "paused":
        log.add(*decisions.request_resume(log.run, "ada", None))
    log.claim()
    assert (log.run.status, log.run.step, log.run.stop_by) == ("starting", 5, None)
    log.end()
    assert log.run.status == "failed", "what fails afterwards is a failure again"


def test_a_run_that_makes_room_again_and_again_never_is_a_crash_loop() -> None:
    log = Log(launch__max_restarts=1)
    for _ in range(5):
        log.claim().train(3).add(*stops.preempt(log.run, "urgent", 5)).end(CRASH)
    assert (log.run.status, log.run.fruitless_attempts, log.run.preemptions) == ("queued", 0, 5)


def test_the_harder_stop_wins() -> None:
    log = Log().claim().train(3)
    log.add(*stops.preempt(log.run, "urgent", 5))
    assert stops.preempt(log.run, "other", 9) == []
    log.add(*stops.pause(log.run, "ada"))
    assert log.run.stop_then == "paused"
    assert stops.pause(log.run, "ada") == []
    log.add(*decisions.request_stop(log.run, "ada"))
    assert (log.run.stop_then, log.run.stop_now) == ("cancelled", False)
    with pytest.raises(Refused, match="is being cancelled"):
        stops.pause(log.run, "ada")
    log.add(*decisions.request_stop(log.run, "ada", now=True))
    assert log.run.stop_now
    assert decisions.request_stop(log.run, "ada") == decisions.request_stop(log.run, "ada", now=True) == []
    log.end(CRASH, 137)
    assert log.run.status == "cancelled"


def test_a_run_that_ends_its_work_while_it_is_being_cancelled_has_succeeded() -> None:
    log = Log(planned=5).claim().train(4).add(events.StopRequested(by="ada")).train(5).save().end(exit_code=0)
    assert log.run.status == "succeeded"


# Retention.


def kept(run: Run) -> list[int]:
    return [s for s, reasons in retention.why_kept(run).items() if reasons]


def deletable(run: Run) -> list[int]:
    return [c.step for c in retention.deletable(run)]


def test_the_newest_and_the_best_are_kept() -> None:
    log = Log(planned=100, checkpoint__keep_last=2, checkpoint__keep_best=1).claim()
    for number, loss in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 2.5), (25, float("nan"))):
        log.train(number).add(validated(number, loss)).save()
    assert retention.why_kept(log.run) == {5: [], 10: ["best"], 15: [], 20: ["last 2"], 25: ["last"]}
    assert deletable(log.run) == [5, 15]
    log.add(events.CheckpointDeleted(step=5, path="/ck/step-5", bytes=10, reason="r"))
    assert deletable(log.run) == [15]


def test_the_best_is_kept_when_it_was_validated_after_it_was_saved() -> None:
    """As a stop does."""
    log = Log(checkpoint__keep_last=1).claim().train(5).save().add(validated(5, 1.0)).end()
    log.claim().train(10).add(validated(10, 2.0)).save().train(15).save()
    assert retention.why_kept(log.run)[5] == ["best", "last verified"]


def test_every_nth_and_the_final_one_are_kept() -> None:
    log = Log(planned=20, checkpoint__keep_last=1, checkpoint__keep_every=10).claim().train(20, save_every=5)
    assert retention.why_kept(log.run) == {5: [], 10: ["every 10"], 15: [], 20: ["last", "every 10", "final"]}


def test_nothing_is_best_without_validations() -> None:
    assert kept(Log(checkpoint__keep_last=1).claim().train(15, save_every=5).run) == [15]


def test_the_last_verified_one_is_kept() -> None:
    log = Log(checkpoint__keep_last=1).claim().train(5).save().end().claim().train(15, save_every=5)
    assert retention.why_kept(log.run) == {5: ["last verified"], 10: [], 15: ["last"]}


def test_nothing_is_deleted_until_a_starting_attempt_has_read_its_checkpoint() -> None:
    log = Log(planned=20, checkpoint__keep_last=1).claim().train(20, save_every=5).end(exit_code=0)
    assert deletable(log.run) == [5, 10, 15]
    log.add(*decisions.request_resume(log.run, "ada", 10))
    assert deletable(log.run) == [5, 15]
    log.add(decisions.claim(log.run, "d", "h"))
    assert deletable(log.run) == []


def test_superseded_ones_stay_until_the_new_history_has_come_to_its_end() -> None:
    log = Log(planned=20, checkpoint__keep_last=1).claim().train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 10)).claim().train(12)
    assert deletable(log.run) == [5]
    log.add(events.StopRequested(by="ada")).end(exit_code=0)
    assert deletable(log.run) == [5]
    log.add(*decisions.request_resume(log.run, "ada", None)).claim().train(20, save_every=20).end(exit_code=0)
    assert log.run.status == "succeeded"
    assert deletable(log.run) == [5, 15]


# Histories that nobody thought of.


@settings(max_examples=200, deadline=None)
@given(STORY, st.data())
def test_folding_in_any_batches_gives_the_same_bytes(story: list[str], data: st.DataObject) -> None:
    log = live(story)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log.recorded)), max_size=5)))
    run = Run(log.run.run_id)
    for start, end in zip([0, *cuts], [*cuts, len(log.recorded)], strict=True):
        run = fold(run, log.recorded[start:end])
        # A state is stored between batches, as JSON.
        run = msgspec.json.decode(msgspec.json.encode(run), type=Run)
    assert msgspec.json.encode(run) == msgspec.json.encode(log.run)


@settings(max_examples=200, deadline=None)
@given(STORY)
def test_what_always_holds(story: list[str]) -> None:
    log = live(story)
    run = log.run
    steps = [c.step for c in run.checkpoints]
    assert steps == sorted(set(steps))
    assert run.step <= run.highest_step
    assert run.tokens_counted == run.step * TOKENS
    gone = set(deletable(run))
    assert not gone or (run.restart_checkpoint is not None and run.restart_checkpoint.step not in gone)
    if run.best_validation is not None:
        assert all(
            c.step not in gone for c in run.checkpoints if c.step == run.planned_steps and not c.superseded
        )
    assert decisions.claim(run, "d", "h").from_step in {0, *steps}
    assert (run.ended_at is not None) == (run.status in ENDED)
    # Who was asked to stop and did is neither stopping any more nor on the way to a crash loop.
    assert (run.stop_by is None) or run.status in {"stopping", "cancelled", "succeeded"}
    assert run.preemptions == sum(t == "AttemptPreempted" for t in log.types)
    failed = sum(t in ("AttemptFailed", "AttemptLost") for t in log.types)
    assert run.fruitless_attempts <= failed
    assert run.status != "failed" or failed


def test_a_redone_checkpoint_is_progress() -> None:
    """Going back and publishing again is no crash loop, although the log has seen these steps before."""
    log = Log(planned=20, launch__max_restarts=0).claim().train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 5)).claim().train(10, save_every=5)
    assert log.run.attempt_progressed


def test_a_spec_of_a_newer_sftd_is_read_without_what_it_added() -> None:
    log = Log()
    submitted = log.recorded[0].event
    assert isinstance(submitted, events.RunSubmitted)
    newer = submitted.spec | {"model": submitted.spec["model"] | {"added": 1}, "new_section": {"x": 1}}
    event = msgspec.structs.replace(submitted, spec=newer)
    run = evolve(Run("r"), msgspec.structs.replace(log.recorded[0], event=event))
    assert run.spec == log.run.spec


def test_without_determinism_rounding_is_no_anomaly_but_other_data_is() -> None:
    log = step(5, loss=2.0, grad_norm=1.0)
    near = step(5, loss=2.001, grad_norm=1.01)
    assert redo_steps.compare(log, near).differs
    assert not redo_steps.compare(log, near, is_exact=False).differs
    far = redo_steps.compare(log, step(5, loss=2.5, grad_norm=1.0), is_exact=False)
    assert set(far.differs) == {"loss"}
    other = redo_steps.compare(log, step(5, loss=2.0, grad_norm=1.0, samples_digest="x"), is_exact=False)
    assert set(other.differs) == {"samples_digest"}


def test_a_checkpoint_published_steps_later_is_of_the_step_that_it_was_begun_at() -> None:
    log = Log(planned=9).claim().train(2)
    log.add(validated(2, 1.5), events.CheckpointStarted(step=2))
    log.train(4)
    log.add(validated(4, 1.0), published(2))
    found = {c.step: c for c in log.run.checkpoints}[2]
    assert (found.tokens_total, found.val_loss) == (2 * TOKENS, 1.5)


# Bit for bit, or to within rounding.


def loaded(device: str = "a", *, deterministic: bool = True) -> events.ModelLoaded:
    return events.ModelLoaded(
        architecture="a",
        parameters=1,
        dtype="f",
        device=device,
        seconds=1.0,
        environment={"device": device, "deterministic": deterministic},
    )


def attempt(log: Log, until: int, *, save_every: int = 5, **given: Any) -> bool:
    """An attempt that trains so far and crashes. Whether its redone steps are compared bit for bit."""
    log.claim().add(loaded(**given))
    is_exact = log.run.is_exact
    log.train(until, save_every=save_every).end()
    return is_exact


def go_back(log: Log, step: int) -> None:
    log.add(events.RunFailed(cause="x", message="y"))
    log.add(*decisions.request_resume(log.run, "ada", step))


def test_exactness_comes_back_once_the_other_steps_are_done_again() -> None:
    log = Log()
    assert attempt(log, 13)
    # On another device steps 11 to 13 are done again; the first time it does not come that far.
    assert not attempt(log, 12, device="b")
    assert not attempt(log, 14, device="b")
    # Behind step 10 all is that device's now.
    assert attempt(log, 18, device="b")
    assert attempt(log, 19, device="b")
    # Before it, it is not.
    go_back(log, 5)
    assert not attempt(log, 18, device="b")
    # Step 19 was computed after a step 10 that differed.
    assert not attempt(log, 20, device="b")
    assert attempt(log, 21, device="b")


def test_without_determinism_nothing_is_exact() -> None:
    log = Log()
    assert not attempt(log, 13, deterministic=False)
    assert not attempt(log, 18, deterministic=False)
    # What is done again now was not deterministic when it was done.
    assert not attempt(log, 20)
    assert attempt(log, 22)


def test_a_superseded_checkpoint_is_not_the_state_of_steps_that_were_done_again_elsewhere() -> None:
    log = Log()
    assert attempt(log, 23, save_every=10)
    # In the same environment it is.
    go_back(log, 10)
    assert attempt(log, 23, save_every=100)
    go_back(log, 20)
    assert attempt(log, 23, save_every=100)
    go_back(log, 10)
    assert not attempt(log, 24, save_every=100, device="b")
    go_back(log, 20)
    assert not attempt(log, 24, save_every=100, device="b")
    go_back(log, 20)
    assert attempt(log, 25, save_every=100, device="b")


def test_a_state_of_an_older_sftd_is_not_exact_until_all_is_done_again() -> None:
    log = Log()
    attempt(log, 13)
    log.run = msgspec.structs.replace(log.run, is_exact=False)
    assert not attempt(log, 14)
    assert attempt(log, 18)
