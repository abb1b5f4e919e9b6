"""Playing a log: what is meant by a moment, the state then, the milestones on the way, and comparing steps with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.log.history import (
    AtStep,
    AtTime,
    AtVersion,
    Moment,
    Steps,
    milestones,
    parse_moment,
    up_to,
)
from sftd.domain.log.timeline import LoggedStep, logged_steps
from sftd.domain.repro.verifier import Comparing, by_how_much
from sftd.domain.run.fold import fold
from sftd.domain.run.state import Run
from tests.builders.log.run_log import Log, step
from tests.builders.log.stories import STORY, live

NOW = 1_700_000_000_000_000
HOUR = 3_600_000_000


def micros(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp() * 1e6)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("300", AtStep(300)),
        ("step:300", AtStep(300)),
        ("v120", AtVersion(120)),
        ("version:120", AtVersion(120)),
        ("-2h", AtTime(NOW - 2 * HOUR)),
        ("-1h30m", AtTime(NOW - HOUR - HOUR // 2)),
        ("-1d", AtTime(NOW - 24 * HOUR)),
        ("2026-01-31T09:30Z", AtTime(micros(2026, 1, 31, 9, 30))),
        ("2026-01-31 09:30:05+02:00", AtTime(micros(2026, 1, 31, 7, 30, 5))),
    ],
)
def test_a_moment_is_understood(text: str, moment: Moment) -> None:
    assert parse_moment(text, NOW) == moment


def test_a_time_without_a_zone_is_local() -> None:
    local = datetime(2026, 1, 31, 9, 30).astimezone()
    assert parse_moment("2026-01-31T09:30", NOW) == AtTime(int(local.timestamp() * 1e6))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("-300", "step:N"),
        ("2h", "write -2h"),
        ("9:30", "T09:30"),
        ("2026-01-31", "2026-01-31T23:59"),
        ("yesterday", "write step:300, v120"),
        ("", "write step:300, v120"),
    ],
)
def test_an_ambiguous_moment_is_refused(text: str, fix: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_moment(text, NOW)
    assert fix in refused.value.problems[0].fix


def interrupted() -> Log:
    """Steps 1 to 6 with a checkpoint at 3, a crash, steps 4 to 8 with one at 6."""
    log = Log(planned=8).claim().train(3).save().train(6).end().claim()
    return log.train(6).save().train(8)


@settings(max_examples=150, deadline=None)
@given(STORY, st.data())
def test_at_a_version_the_state_is_what_it_was_then(story: list[str], data: st.DataObject) -> None:
    """Not against another fold: against the state from which the next deed of the story was decided."""
    done = data.draw(st.integers(0, len(story)))
    then, whole = live(story[:done]), live(story)
    played = up_to(whole.recorded, AtVersion(then.run.version))
    assert msgspec.json.encode(fold(Run(whole.run.run_id), played)) == msgspec.json.encode(then.run)
    # Each event has its own time here, so a time is as good as a version; a step is in the state that it leads to.
    assert up_to(whole.recorded, AtTime(then.recorded[-1].occurred_at)) == played
    for number in {r.event.step for r in whole.recorded if isinstance(r.event, e.StepCompleted)}:
        assert fold(Run("r"), up_to(whole.recorded, AtStep(number))).step == number


def test_a_step_is_the_last_attempts_with_what_belongs_to_it() -> None:
    log = interrupted()
    run = fold(Run("r"), up_to(log.recorded, AtStep(6)))
    assert (run.attempt, run.step, [c.step for c in run.checkpoints]) == (2, 6, [3, 6])
    # Step 2 was never done again: the state is that of the first attempt.
    run = fold(Run("r"), up_to(log.recorded, AtStep(2)))
    assert (run.attempt, run.step, run.status) == (1, 2, "running")
    assert up_to(log.recorded, AtStep(0))[-1].type == "AttemptClaimed"
    for wrong in (AtStep(9), AtVersion(0), AtVersion(len(log.recorded) + 1)):
        with pytest.raises(Refused):
            up_to(log.recorded, wrong)
    with pytest.raises(Refused, match="no step yet"):
        up_to(Log().recorded, AtStep(1))
    assert len(up_to(Log().recorded, AtStep(0))) == 1


def test_a_late_report_does_not_hide_what_came_later() -> None:
    """A journal that is ingested late has steps that were before a request that the log already has."""
    log = Log().claim().train(2)
    early = log.recorded[-1].occurred_at
    log.add(e.StopRequested(by="ada"), step(3))
    log.recorded[-1] = msgspec.structs.replace(log.recorded[-1], occurred_at=early + 1)
    run = fold(Run("r"), up_to(log.recorded, AtTime(early + 1)))
    assert (run.step, run.status) == (3, "running")


def test_milestones_are_compact_and_mark_what_was_redone() -> None:
    log = interrupted()
    log.add(e.AnomalyDetected(step=8, what="odd"))
    told = list(milestones(log.recorded))
    steps = [m for m in told if isinstance(m, Steps)]
    assert [(s.attempt, s.first, s.last, s.redone, s.checkpoints) for s in steps] == [
        (1, 1, 6, False, (3,)),
        (2, 4, 6, True, (6,)),
        (2, 7, 8, False, ()),
    ]
    assert steps[2].anomalies == ((8, "odd"),)
    others = [m.type for m in told if not isinstance(m, Steps)]
    assert others == ["RunSubmitted", "AttemptClaimed", "AttemptFailed", "AttemptClaimed"]


ENVIRONMENT: dict[str, Any] = {
    "torch": "2",
    "deterministic": True,
    "dtype": "float32",
    "layout": {"tp": 1},
    "variables": {},
}


def loaded(**changes: Any) -> e.ModelLoaded:
    return e.ModelLoaded(
        architecture="a",
        parameters=1,
        dtype="float32",
        device="cpu",
        seconds=1.0,
        environment=ENVIRONMENT | changes,
    )


def compared(now: e.ModelLoaded, *redone: e.StepCompleted) -> tuple[Comparing, list[dict[str, Any]]]:
    """Steps with loss 2.0, recorded in `ENVIRONMENT`, against others."""
    log = Log().claim()
    log.add(loaded()).train(4)
    comparing = Comparing(logged_steps(log.recorded), now, {})
    return comparing, [comparing.add(s) for s in redone]


def test_a_last_bit_counts_in_the_same_environment() -> None:
    off = 2.0000000000000004
    comparing, found = compared(loaded(), step(1), step(2, loss=off))
    assert found == [{}, {"loss": {"recorded": 2.0, "redone": off}}]
    assert (comparing.agreeing, comparing.is_exact, comparing.may_round) == (1, True, False)


def test_another_environment_may_round_but_not_train_other_rows() -> None:
    comparing, found = compared(
        loaded(torch="3"), step(1), step(2, loss=2.00001), step(3, loss=2.1), step(4, samples_digest="x")
    )
    assert [list(f) for f in found] == [[], [], ["loss"], ["samples_digest"]]
    assert not comparing.is_exact
    assert comparing.environment(2) == {"torch": ["2", "3"]}


def test_equal_bits_are_exact_whatever_the_environment() -> None:
    comparing, found = compared(loaded(torch="3"), step(1), step(2))
    assert (found, comparing.is_exact) == ([{}, {}], True)


def test_what_decides_nothing_allows_no_rounding() -> None:
    comparing, found = compared(loaded(transformers="5"), step(1, loss=2.00001))
    assert list(found[0]) == ["loss"]
    assert not comparing.may_round


def test_how_far_off() -> None:
    assert by_how_much(2.0, 2.5) == "+25 %"
    assert by_how_much(2.0, float("nan")) == ""
    assert by_how_much("a", "b") == ""


def test_each_step_that_agrees_is_counted() -> None:
    steps = [step(n) for n in (1, 2, 3)]
    loaded = e.ModelLoaded(
        architecture="a",
        parameters=1,
        dtype="float32",
        device="cpu",
        seconds=1.0,
        environment={"deterministic": True},
    )
    log = {one.step: LoggedStep(one, one.step, loaded.environment) for one in steps}
    comparing = Comparing(log, loaded, {})
    assert [comparing.add(one) for one in steps[:2]] == [{}, {}]
    assert comparing.agreeing == 2
    assert comparing.add(step(3, loss=9.0)).keys() == {"loss"}
    assert (comparing.agreeing, comparing.is_exact) == (2, True)
