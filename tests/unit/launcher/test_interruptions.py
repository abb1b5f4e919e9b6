"""What it makes of a run that Slurm ended its attempt."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sftd.domain.log import events as e
from sftd.domain.run.decisions import end_attempt
from sftd.domain.run.failures import Cause, Failure, Interruption, Remains, classify
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.spec import Spec

CHECKPOINT = CheckpointInfo(
    step=20, path="/c", bytes=1, manifest_digest="m", tokens_total=1, version=9, published_at=1
)


def end(kind: Any, exit_code: int | None = None, **state: Any) -> list[e.Event]:
    run = msgspec.structs.replace(
        Run("r", spec=Spec(), planned_steps=100, status="running", checkpoints=(CHECKPOINT,)), **state
    )
    return end_attempt(
        run,
        exit_code=exit_code,
        failure=Failure("killed", "gone"),
        lost=True,
        now=0,
        backoff_base=1.0,
        interruption=Interruption(kind, "because"),
    )


@pytest.mark.parametrize("kind", ["preempted", "requeued"])
@pytest.mark.parametrize("progressed", [False, True])
def test_what_was_taken_away_is_queued_again(kind: str, progressed: bool) -> None:
    assert end(kind, attempt_progressed=progressed) == [
        e.AttemptPreempted(step=20, by_run="", reason="because")
    ]


def test_a_time_limit_is_no_failure_for_whoever_got_on() -> None:
    assert end("time limit", attempt_progressed=True) == [
        e.AttemptPreempted(step=20, by_run="", reason="because")
    ]
    # Told in time: torchrun ends without an error.
    assert isinstance(end("time limit", 0, attempt_progressed=True)[0], e.AttemptPreempted)


def test_a_time_limit_within_which_nothing_is_achieved_ends_as_a_crash_loop() -> None:
    (failed,) = end("time limit", 0)
    assert isinstance(failed, e.AttemptFailed)
    assert (failed.cause, failed.message) == ("time limit", "because")
    assert failed.retry_at is not None
    events = end("time limit", fruitless_attempts=2)
    assert isinstance(events[-1], e.RunFailed)


def test_who_cancels_behind_sftds_back_pauses_the_run() -> None:
    assert end("cancelled") == [e.AttemptPaused(step=20, by="because")]


def test_a_person_who_asked_first_is_heard_first() -> None:
    assert end("cancelled", stop_by="ada") == [e.RunCancelled(by="ada")]
    assert end("time limit", stop_by="ada", stop_then="paused") == [e.AttemptPaused(step=20, by="ada")]


@pytest.mark.parametrize(
    ("word", "known", "cause"),
    [
        ("slurm: NODE_FAIL: job 7 on n1, exit code 0:0", "lost", "lost"),
        ("slurm: OUT_OF_MEMORY: job 7 on n1, exit code 0:125", "out of memory", "out of memory"),
        ("slurm: FAILED: job 7 on n1, exit code 1:0", None, "killed"),
    ],
)
def test_slurms_last_word_is_heard(word: str, known: Cause | None, cause: str) -> None:
    failure = classify(Remains(exit_code=None, last_word=word, last_cause=known))
    assert (failure.cause, failure.message) == (cause, word)


def test_the_ranks_own_error_is_heard_first() -> None:
    remains = Remains(
        exit_code=1, output_tail=["ValueError: x"], last_word="slurm: FAILED: job 7, exit code 1:0"
    )
    assert classify(remains).message == "ValueError: x"
