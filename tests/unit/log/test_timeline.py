"""One timeline: the state, the curves, `sftd verify`, a redo and the watch for spikes agree on which steps are the run's."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings

from sftd.domain.compare.curves import CurvePoint, Curves, RunCurves
from sftd.domain.compare.differences import COMPARED as COMPARED_CURVES
from sftd.domain.compare.differences import part
from sftd.domain.log import events as e
from sftd.domain.log.history import AtStep, Steps, milestones, up_to
from sftd.domain.log.timeline import Timeline, logged_steps, places
from sftd.domain.repro.steps import COMPARED, redone_steps, rounds_to, steps_to_redo
from sftd.domain.repro.verifier import Comparing
from sftd.domain.run import decisions
from sftd.domain.run.exactness import compare_with_log
from sftd.domain.run.loss_watch import losses_before
from tests.builders.log.histories import claimed
from tests.builders.log.run_log import Log, step
from tests.builders.log.stories import STORY, live


def numbered(log: Log) -> list[e.Recorded]:
    """The stream with a loss for each step that says which record it is: 0, 1, …"""
    found, place = [], 0
    for r in log.recorded:
        event = r.event
        if isinstance(event, e.StepCompleted):
            event, place = msgspec.structs.replace(event, loss=float(place)), place + 1
        found.append(msgspec.structs.replace(r, event=event))
    return found


def loaded(**environment: str) -> e.ModelLoaded:
    (event,) = (event for event in claimed(**environment) if isinstance(event, e.ModelLoaded))
    return event


def curves_of(recorded: list[e.Recorded]) -> Curves:
    history = RunCurves()
    for r in recorded:
        event: e.Event | CurvePoint = r.event
        if isinstance(event, e.StepCompleted):
            event = msgspec.convert(msgspec.to_builtins(event), CurvePoint)
        history.add(r.version, r.occurred_at, event)
    return history.curves


@settings(max_examples=150, deadline=None)
@given(STORY)
def test_all_that_read_a_run_agree_on_its_steps(story: list[str]) -> None:
    log = live(story)
    recorded = numbered(log)
    timeline = Timeline(r.event for r in recorded)
    steps = dict(places(timeline.line))
    assert timeline.last == log.run.step
    assert sorted(steps) == list(range(1, log.run.step + 1)), "the state has all of them, without a gap"
    assert {number: one.event.loss for number, one in logged_steps(recorded).items()} == steps
    curves = curves_of(recorded)
    assert list(curves.columns["loss"]) == list(steps.values())
    assert losses_before((r.event for r in recorded), log.run.step)[-64:] == list(steps.values())[-64:]
    for number, place in steps.items():
        then = up_to(recorded, AtStep(number))
        assert sum(isinstance(r.event, e.StepCompleted) for r in then) == place + 1


def back_to_a_superseded_checkpoint() -> Log:
    """Attempt 1 does 1 to 20, attempt 2 goes back to 5 and does 6 to 8, attempt 3 begins at attempt 1's checkpoint of 15."""
    log = Log(planned=20).claim().add(loaded()).train(20, save_every=5).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 5)).claim().add(loaded(torch="3")).train(8).end()
    log.add(e.RunFailed(cause="x", message="y"), *decisions.request_resume(log.run, "ada", 15))
    return log.claim().add(loaded()).train(16)


def test_a_superseded_checkpoint_brings_its_steps_back() -> None:
    recorded = numbered(back_to_a_superseded_checkpoint())
    # Steps 6 to 15 are attempt 1's again; 20, 21 and 22 were attempt 2's, 23 is attempt 3's.
    expected = [float(n) for n in (*range(15), 23)]
    assert list(curves_of(recorded).columns["loss"]) == expected
    log = logged_steps(recorded)
    assert [log[n].event.loss for n in sorted(log)] == expected
    assert {log[n].environment["torch"] for n in log} == {"2.11"}
    events = [r.event for r in recorded]
    assert losses_before(events, 16) == expected
    assert losses_before(events[:-1], 15) == expected[:15]
    assert steps_to_redo(events)[17].loss == 16.0
    assert [was.loss for was, now in redone_steps(events) if now.loss == 23.0] == [15.0]


def test_validations_are_those_of_the_timelines_steps() -> None:
    curves = Curves()
    point = msgspec.convert(msgspec.to_builtins(step(1)), CurvePoint)
    for number, loss in ((4, 1.0), (4, 2.0)):
        curves.take(e.AttemptClaimed(daemon="d", host="h", from_step=3 if loss > 1 else 0))
        for n in range(4 if loss > 1 else 1, number + 1):
            curves.add(msgspec.structs.replace(point, step=n))
        curves.take(e.ValidationCompleted(step=number, loss=loss, tokens=1, rows=1, seconds=1.0))
        if loss == 1.0:
            curves.take(e.ValidationCompleted(step=2, loss=0.5, tokens=1, rows=1, seconds=1.0))
    assert curves.validations == {2: 0.5, 4: 2.0}
    curves.take(e.AttemptClaimed(daemon="d", host="h", from_step=3))
    assert curves.validations == {2: 0.5}


def test_a_fork_has_its_parents_steps_up_to_the_checkpoint() -> None:
    parent = Log().claim().train(6, save_every=3)
    timeline = Timeline(r.event for r in parent.recorded)
    fork = e.RunForked(
        parent="p",
        step=3,
        sample=0,
        checkpoint="/ck/step-3",
        manifest_digest="m",
        bytes=1,
        tokens_total=1,
        changes={},
        by="ada",
    )
    for event in (fork, e.AttemptClaimed(daemon="d", host="h", from_step=3), step(4), step(5)):
        timeline.add(event)
    assert dict(places(timeline.line)) == {1: 0, 2: 1, 3: 2, 4: 6, 5: 7}
    # The parent's checkpoints are not the fork's.
    timeline.add(e.AttemptClaimed(daemon="d", host="h", from_step=6))
    assert timeline.last == 5


def test_a_step_with_other_samples_is_not_redone() -> None:
    """`replay` and a redo agree, also where a rejected checkpoint takes a rollback back."""
    log = Log(data__train_batch_size=4).claim().train(12, save_every=5).end()
    log.add(e.SamplesSkipped(step=10, sample=48, reason="r")).claim().train(12).end()
    log.add(e.CheckpointRejected(step=10, path="/ck/step-10", reason="r")).claim().train(12)
    steps = [m for m in milestones(log.recorded) if isinstance(m, Steps)]
    assert [(s.attempt, s.first, s.last, s.redone) for s in steps] == [
        (1, 1, 12, False),
        (2, 11, 12, False),
        (3, 6, 12, True),
    ]
    pairs = [(was.step, now.step) for was, now in redone_steps(r.event for r in log.recorded)]
    assert pairs == [(n, n) for n in range(6, 13)]
    assert sorted(steps_to_redo(r.event for r in log.recorded)) == list(range(6, 13))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", ["loss", "grad_norm"])
@pytest.mark.parametrize(("share", "is_apart"), [(0.0, False), (0.99, False), (1.01, True)])
def test_resume_verify_and_compare_allow_the_same_rounding(
    dtype: str, number: str, share: float, is_apart: bool
) -> None:
    was = step(1, loss=2.0, grad_norm=2.0)
    now = msgspec.structs.replace(was, **{number: 2.0 * (1 - share * rounds_to(dtype)[number])})
    log = Log().claim().add(loaded(dtype=dtype)).add(was)
    known = logged_steps(log.recorded)
    log.end().claim().add(loaded(dtype=dtype, torch="3"))
    resumed = compare_with_log({1: was}, log.run, now)
    assert resumed is not None
    assert (resumed.anomaly is not None, resumed.is_exact) == (is_apart, share == 0.0)
    verified = Comparing(known, loaded(dtype=dtype, torch="3"), {})
    assert (bool(verified.add(now)), verified.is_exact) == (is_apart, share == 0.0)
    sides = []
    for one in (was, now):
        sides.append(Curves())
        sides[-1].add(msgspec.convert(msgspec.to_builtins(one), CurvePoint))
    assert (part(sides[0], sides[1], "b", {dtype}).beyond_rounding is not None) == is_apart


def test_compare_looks_at_the_numbers_that_a_redo_looks_at() -> None:
    assert {name.removesuffix("_digest") for name in COMPARED} == set(COMPARED_CURVES)


def test_a_long_run_has_few_stretches() -> None:
    """A checkpoint begins no stretch: the timeline of a run of a million steps is a handful of numbers."""
    timeline = Timeline()
    for number in range(1, 1001):
        timeline.add_step(number)
        timeline.add(e.CheckpointPublished(step=number, path="p", bytes=1, manifest_digest="m", seconds=1.0))
    (stretch,) = timeline.line
    assert (stretch.first, stretch.last, stretch.place) == (1, 1000, 0)


def test_the_last_steps_alone_are_the_same_curves() -> None:
    curves = curves_of(numbered(back_to_a_superseded_checkpoint()))
    tail = curves.tail(4)
    assert (tail.first, tail.last) == (13, 16)
    assert list(tail.values("loss", 13, 16)) == list(curves.values("loss", 13, 16))
    assert all(math.isfinite(b - a) for a, b in pairwise(tail.columns["seconds"]))
