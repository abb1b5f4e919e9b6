"""Which steps should not be learnt from: a function of the losses before, the same after a resume."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.domain.log.events import AnomalyDetected, AttemptClaimed, Event, StepCompleted
from sftd.domain.run.loss_watch import WINDOW, LossWatch, losses_before


def completed(number: int, loss: float) -> StepCompleted:
    return StepCompleted(
        step=number,
        epoch=0,
        loss=loss,
        grad_norm=1.0,
        lr=1e-5,
        tokens=1,
        tokens_real=1,
        tokens_padded=1,
        tokens_total=number,
        samples=1,
        samples_digest="d",
        seconds=1.0,
    )


def train(watch: LossWatch, losses: list[float], first: int, policy: str) -> list[Event]:
    """What the trainer records of steps with these losses."""
    events: list[Event] = []
    for number, loss in enumerate(losses, first):
        events.append(completed(number, loss))
        what = watch.judge(loss, 1.0)
        if what is not None:
            events.append(AnomalyDetected(step=number, what=what, detail={"policy": policy}))
        if what is None or policy == "record":
            watch.add(loss)
    return events


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_told_from_the_first_step_on(bad: float) -> None:
    watch = LossWatch(0.0)
    assert watch.judge(bad, 1.0) == "non_finite_loss"
    assert watch.judge(1.0, bad) == "non_finite_loss"
    assert watch.judge(1e300, 1.0) is None


def test_a_spike_is_far_above_the_median_of_enough_losses() -> None:
    watch = LossWatch(3.0, [2.0] * 15)
    assert watch.judge(100.0, 1.0) is None, "too few to tell"
    watch.add(2.0)
    assert watch.judge(6.0, 1.0) is None
    assert watch.judge(6.1, 1.0) == "loss_spike"
    assert LossWatch(0.0, [2.0] * 64).judge(100.0, 1.0) is None, "0 is never"


@given(
    losses=st.lists(
        st.one_of(st.floats(0.1, 100.0), st.just(math.nan)), min_size=2 * WINDOW, max_size=3 * WINDOW
    ),
    cut=st.integers(0, 2 * WINDOW),
    policy=st.sampled_from(["skip", "record"]),
)
def test_a_resumed_attempt_says_what_an_undisturbed_one_says(
    losses: list[float], cut: int, policy: str
) -> None:
    whole = train(LossWatch(3.0), losses, 1, policy)
    # The first attempt came further than its last checkpoint.
    first = train(LossWatch(3.0), losses[: cut + 5], 1, policy)
    again = train(LossWatch(3.0, losses_before(first, cut)), losses[cut:], cut + 1, policy)
    kept = [event for event in whole if event.step > cut]  # type: ignore[attr-defined]
    # repr: one NaN is another.
    assert repr(again) == repr(kept)


def test_a_resume_knows_the_last_losses_of_the_timeline_that_were_learnt_from() -> None:
    events: list[Event] = [completed(n, float(n)) for n in range(1, WINDOW + 11)]
    assert losses_before(events, WINDOW + 5) == [float(n) for n in range(6, WINDOW + 6)]
    # A later attempt replaces a step's loss; a step whose update was skipped, and one without a number, were not learnt from.
    events += [
        AttemptClaimed(daemon="d", host="h", from_step=69),
        completed(70, 0.5),
        completed(71, 99.0),
        AnomalyDetected(step=71, what="loss_spike", detail={"policy": "skip"}),
        completed(72, 98.0),
        AnomalyDetected(step=72, what="loss_spike", detail={"policy": "record"}),
        completed(73, math.nan),
        completed(74, 74.0),
    ]
    assert losses_before(events, 74)[-4:] == [69.0, 0.5, 98.0, 74.0]
    assert len(losses_before(events, 74)) == WINDOW


def test_only_the_last_losses_make_the_median() -> None:
    watch = LossWatch(3.0, [1000.0] * WINDOW + [2.0] * (WINDOW // 2 + 1))
    assert watch.median == 2.0
    for _ in range(WINDOW):
        watch.add(8.0)
    assert watch.median == 8.0
    watch.add(math.inf)
    assert watch.median == 8.0
