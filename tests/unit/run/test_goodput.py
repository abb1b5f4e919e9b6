"""The goodput ledger: histories in seconds, and as a property of any history."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sftd.domain.log import codec
from sftd.domain.log import events as e
from sftd.domain.run.goodput import ACCOUNTS, TYPES, Fold, Ledger, StepTime

START = 1_700_000_000
History = list[tuple[float, e.Event | StepTime]]


def submitted() -> e.RunSubmitted:
    return e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=9, user="ada", data={}, model={}, sftd_version="0"
    )


def claimed() -> e.AttemptClaimed:
    return e.AttemptClaimed(daemon="d", host="h", from_step=0)


def step(number: int, seconds: float = 1.0) -> StepTime:
    return StepTime(number, seconds)


def validated(number: int, seconds: float) -> e.ValidationCompleted:
    return e.ValidationCompleted(step=number, loss=1.0, tokens=1, rows=1, seconds=seconds)


def saving(number: int) -> e.CheckpointStarted:
    return e.CheckpointStarted(step=number)


def saved(number: int) -> e.CheckpointPublished:
    return e.CheckpointPublished(step=number, path="p", bytes=1, manifest_digest="m", seconds=1.0)


def failed() -> e.AttemptFailed:
    return e.AttemptFailed(cause="crash", message="m", exit_code=1)


def succeeded() -> e.RunSucceeded:
    return e.RunSucceeded(steps=1, tokens=1, final_checkpoint="c")


def ledger(history: History, now: float = 0) -> Ledger:
    fold = Fold()
    for at, event in history:
        fold.add(int((START + at) * 1e6), event)
    return fold.ledger(int((START + now) * 1e6))


def spent(history: History, now: float = 0) -> dict[str, float]:
    """Seconds of the accounts that are not empty."""
    found = ledger(history, now)
    assert sum(found.micros.values()) == found.until - found.began_at
    return {account: micros / 1e6 for account, micros in found.micros.items() if micros}


def test_a_run_without_trouble() -> None:
    history: History = [
        (0, submitted()),
        (5, claimed()),
        (20, validated(0, 3)),
        (22, step(1)),
        (23, step(2)),
        (25, step(3)),
        (26, saving(3)),
        (30, saved(3)),
        (33, validated(3, 2.5)),
        (34, succeeded()),
    ]
    assert spent(history) == {
        "queued": 5,
        "starting": 13,
        "validating": 5.5,
        "productive": 3,
        "checkpointing": 4,
        "other": 3.5,
    }
    found = ledger(history)
    assert (found.wall_seconds, found.held_seconds) == (34, 29)
    assert found.goodput == pytest.approx(3 / 29)
    assert found.as_json()["wall"] == 34
    # What is asked later says the same: the run has ended.
    assert ledger(history, now=1000) == found


def test_a_crash_costs_its_replay_and_a_restart() -> None:
    history: History = [
        (0, submitted()),
        (0, claimed()),
        (11, step(1)),
        (12, saving(1)),
        (13, saved(1)),
        (14, step(2)),
        (20, failed()),  # hung for six seconds, or was killed in step 3
        (35, claimed()),
        (41, step(2)),
        (43, step(3, 2)),
        (43, succeeded()),
    ]
    assert spent(history) == {
        "starting": 10,
        "productive": 4,
        "checkpointing": 1,
        "replayed": 1,
        "restarting": 6 + 15 + 5,
        "other": 1,
    }


def test_a_failed_run_is_idle_until_a_person_resumes_it() -> None:
    history: History = [
        (0, submitted()),
        (1, claimed()),
        (4, failed()),
        (4, e.RunFailed(cause="crash", message="m")),
        (104, e.ResumeRequested(by="ada")),
        (110, claimed()),
        (113, step(1)),
        (114, e.RunCancelled(by="ada")),
    ]
    assert spent(history[:4]) == {"queued": 1, "starting": 3}
    assert spent(history) == {
        "queued": 7,
        "starting": 3,
        "idle": 100,
        "restarting": 2,
        "productive": 1,
        "other": 1,
    }


def test_a_stopped_attempt_gives_its_devices_back() -> None:
    """Preempted it waits for its turn, paused for a person; neither is time in which it held devices."""
    history: History = [
        (0, submitted()),
        (1, claimed()),
        (4, step(1)),
        (5, e.AttemptPreempted(step=1, by_run="urgent")),
        (15, claimed()),
        (18, step(2)),
        (19, e.AttemptPaused(step=2, by="ada")),
        (49, e.ResumeRequested(by="ada")),
    ]
    assert spent(history) == {
        "queued": 11,
        "starting": 2,
        "restarting": 2,
        "productive": 2,
        "other": 2,
        "idle": 30,
    }


def test_what_is_done_again_is_replayed_whatever_it_is() -> None:
    first: History = [(0, submitted()), (0, claimed()), (1, step(1)), (2, validated(1, 1)), (3, saving(1))]
    first += [(4, saved(1)), (5, succeeded()), (5, e.ResumeRequested(by="ada", from_step=0)), (5, claimed())]
    again: History = [(6, step(1)), (7, validated(1, 1)), (7, saving(1)), (8, saved(1)), (8, succeeded())]
    assert spent(first + again)["replayed"] == 3
    assert spent(first + again)["productive"] == 1


def test_steps_come_before_a_checkpoint_that_is_written_meanwhile() -> None:
    history: History = [
        (0, submitted()),
        (0, claimed()),
        (1, step(1)),
        (1, saving(1)),
        (3, step(2)),  # held up for one second
        (4, step(3)),
        (4.5, saved(1)),
        (6, step(4)),  # and for another half, until the writing was done
        (6, succeeded()),
    ]
    assert spent(history) == {"productive": 4, "checkpointing": 1.5, "other": 0.5}


def test_a_checkpoint_that_fails_costs_until_it_has_failed() -> None:
    anomaly = e.AnomalyDetected(step=1, what="checkpoint_failed")
    history: History = [(0, submitted()), (0, claimed()), (1, step(1)), (1, saving(1)), (3, anomaly)]
    assert spent([*history, (9, step(2)), (9, succeeded())]) == {
        "productive": 2,
        "checkpointing": 2,
        "other": 5,
    }


def test_a_run_that_goes_on_is_told_up_to_now() -> None:
    assert spent([(0, submitted())], now=7) == {"queued": 7}
    assert spent([(0, submitted()), (2, claimed())], now=7) == {"queued": 2, "starting": 5}
    history: History = [(0, submitted()), (0, claimed()), (1, step(1))]
    assert spent(history, now=3) == {"productive": 1, "other": 2}
    assert spent([*history, (1, saving(1))], now=3) == {"productive": 1, "checkpointing": 2}
    assert ledger([(0, submitted())]).goodput is None


def test_asking_changes_nothing() -> None:
    history: History = [(0, submitted()), (0, claimed()), (1, step(1)), (1, saving(1)), (3, saved(1))]
    fold = Fold()
    for at, event in history:
        fold.add(int((START + at) * 1e6), event)
        fold.ledger(int((START + 50) * 1e6))
    assert fold.ledger(int((START + 3) * 1e6)) == ledger(history, now=3)


def test_clocks_that_run_backwards_or_say_nonsense() -> None:
    history: History = [
        (10, submitted()),
        (5, claimed()),
        (11, StepTime(1, 99.0)),
        (10, StepTime(2, 1.0)),
        (12, StepTime(3, "NaN")),
        (11, succeeded()),
    ]
    assert spent(history) == {"productive": 1, "other": 1}


def test_a_step_of_any_version_has_what_the_ledger_reads() -> None:
    """The store decodes these two fields alone, without the upcasts."""
    names = set(StepTime.__struct_fields__)
    assert names <= set(e.StepCompleted.__struct_fields__)
    for version in range(1, e.StepCompleted.schema_version):
        raised = codec.UPCASTS["StepCompleted", version]({"step": 7, "seconds": 0.5})
        assert (raised["step"], raised["seconds"]) == (7, 0.5)
    assert set(TYPES) <= set(e.EVENT_TYPES)


_numbers = st.integers(0, 6)
_seconds = st.floats(0, 5)
_events: st.SearchStrategy[e.Event | StepTime] = st.one_of(
    st.builds(claimed),
    st.builds(step, _numbers, _seconds),
    st.builds(validated, _numbers, _seconds),
    st.builds(saving, _numbers),
    st.builds(saved, _numbers),
    st.builds(failed),
    st.builds(lambda: e.AttemptLost(message="m")),
    st.builds(lambda: e.AttemptPaused(step=1, by="ada")),
    st.builds(lambda: e.AttemptPreempted(step=1, by_run="r")),
    st.builds(succeeded),
    st.builds(lambda: e.RunFailed(cause="c", message="m")),
    st.builds(lambda: e.RunCancelled(by="ada")),
    st.builds(lambda: e.ResumeRequested(by="ada")),
    st.builds(lambda: e.AnomalyDetected(step=1, what="checkpoint_failed")),
)


@given(st.lists(st.tuples(st.floats(-1, 4), _events), max_size=40), st.floats(0, 100))
@example([(1.0, saving(0)), (-1.0, succeeded())], 0.0)
def test_the_accounts_add_up_to_the_wall_time(after: list[tuple[float, Any]], now: float) -> None:
    """Whatever happened, in whatever order, with whatever clocks: nothing is lost, nothing counted twice."""
    at = 0.0
    history: History = [(at, submitted())]
    for seconds, event in after:
        at += seconds
        history.append((at, event))
    found = ledger(history, now)
    assert set(found.micros) == set(ACCOUNTS)
    assert all(micros >= 0 for micros in found.micros.values())
    assert sum(found.micros.values()) == found.until - found.began_at
    steps = [event for _, event in history if isinstance(event, StepTime)]
    claims = sum(int(float(s.seconds) * 1e6) for s in steps)
    assert found.micros["productive"] <= claims
    ends = [i for i, (_, event) in enumerate(history) if isinstance(event, e.RunSucceeded | e.RunCancelled)]
    if ends and ends[-1] == len(history) - 1:
        latest = max(int((START + at) * 1e6) for at, _ in history)
        assert found.until == latest
    assert msgspec.json.decode(msgspec.json.encode(found.as_json()))["wall"] == found.wall_seconds
