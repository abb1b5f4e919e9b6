"""Early stopping and the best checkpoints: functions of the log, whatever happens to the attempts."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.domain.log import events as e
from sftd.domain.run import decisions, early_stop, retention
from sftd.domain.run.early_stop import Patience
from sftd.domain.spec.sections import EarlyStop
from tests.builders.log.run_log import Log, validated

RULE = {"metric": "val_loss", "mode": "min", "patience": 2}
ANSWERS = {"metric": "c/score", "mode": "max"}
COMMAND = {"kind": "command", "name": "c", "argv": ["x"]}
LOSSES = st.sampled_from([1.0, 1.5, 2.0, 2.5, math.nan, math.inf])


def log_of(**keys: Any) -> Log:
    """40 planned steps, validated and saved every 5."""
    given = {"data__val_files": ["/v"], "trainer__val_check_interval": 5, "trainer__save_interval": 5}
    return Log(planned=40, **given | {"trainer__early_stop": RULE} | keys).claim()


def until(log: Log, step: int, loss: float) -> Log:
    return log.train(step).add(validated(step, loss)).save()


def the_patience(log: Log, step: int) -> Patience:
    return early_stop.before([r.event for r in log.recorded], log.run, step)


def stopped(step: int) -> e.StoppedEarly:
    return e.StoppedEarly(step=step, metric="val_loss", best=1.0, best_step=5, patience=2)


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "step", "best"),
    [
        ("min", 0.0, [3.0, 2.0, 2.0, 2.5], 4, (2.0, 2)),
        ("min", 0.0, [3.0, 2.0, 2.5, 1.9, 2.0], None, None),
        ("max", 0.0, [0.1, 0.5, 0.4, 0.5], 4, (0.5, 2)),
        # Each is better, but none by enough; the best stays the one that they are compared with.
        ("min", 0.5, [3.0, 2.8, 2.5], 3, (3.0, 1)),
        ("min", 0.5, [3.0, 2.8, 2.4, 2.3], None, None),
        ("min", 0.0, [2.0, math.nan, math.inf], 3, (2.0, 1)),
        ("min", 0.0, [math.nan, math.nan], 2, (None, 0)),
    ],
)
def test_patience_counts_values_without_an_improvement(
    mode: Any, min_delta: float, values: list[float], step: int | None, best: Any
) -> None:
    rule = EarlyStop(metric="val_loss", mode=mode, patience=2, min_delta=min_delta)
    stop = early_stop.stop_of(rule, enumerate(values, 1))
    assert (stop and stop.step) == step
    assert stop is None or (stop.best, stop.best_step) == best


@given(st.lists(LOSSES, min_size=1, max_size=8), st.data())
def test_an_attempt_decides_as_the_log_does_wherever_it_was_resumed(
    losses: list[float], data: st.DataObject
) -> None:
    """Attempts die after any checkpoint and go back to any; the log of each prefix gives the patience of an undisturbed run."""
    log, done = log_of(), 0
    rule = log.run.spec.trainer.early_stop
    assert rule is not None
    whole = [(5 * n, loss) for n, loss in enumerate(losses, 1)]
    while done < len(losses):
        until(log, 5 * (done + 1), losses[done])
        done += 1
        if data.draw(st.booleans()):
            log.end(lost=True)
            done = data.draw(st.integers(0, done))
            log.add(e.ResumeRequested(by="ada", from_step=5 * done)).claim()
        assert the_patience(log, 5 * done) == early_stop.patience(rule, whole[:done])


def test_a_run_that_stopped_early_has_succeeded_and_counts_anew_when_it_is_resumed() -> None:
    log = log_of()
    for step, loss in ((5, 1.0), (10, 2.0), (15, 3.0)):
        log.train(step).add(validated(step, loss))
        if step < 15:
            log.save()
    log.add(stopped(15))
    # It died before it saved: the next attempt must decide again.
    assert log.end().run.status == "retrying"
    log.claim()
    assert (log.run.stopped_early, the_patience(log, 10)) == (None, Patience(1.0, 5, 1))
    log.train(15).add(validated(15, 3.0), stopped(15)).save().end(exit_code=0)
    run = log.run
    assert (run.status, run.step, run.cause) == ("succeeded", 15, "stopped early")
    assert run.message == "val_loss has not improved on 1 (step 5) in 2 values"
    (request,) = decisions.request_resume(run, "ada", None)
    log.add(request).claim()
    assert (log.run.status, the_patience(log, 15)) == ("starting", Patience())


def evaluate(log: Log, step: int, score: float) -> None:
    started = e.EvaluationStarted(
        name="c", step=step, checkpoint="/ck", manifest_digest="m", daemon="d", devices=[]
    )
    done = e.EvaluationCompleted(
        name="c",
        step=step,
        kind="command",
        metrics={"score": score},
        questions=0,
        questions_digest="",
        manifest_digest="m",
        environment={},
        seconds=1.0,
    )
    log.add(started, done)


def test_an_evaluation_stops_its_run_whatever_the_order_of_results() -> None:
    log = log_of(evaluation=[COMMAND], trainer__early_stop=ANSWERS | {"patience": 2})
    for step in (5, 10, 15, 20):
        until(log, step, 1.0)
    evaluate(log, 5, 0.5)
    evaluate(log, 15, 0.5)
    assert early_stop.evaluated(log.run) == []
    evaluate(log, 10, 0.4)
    stop, request = early_stop.evaluated(log.run)
    assert isinstance(stop, e.StoppedEarly)
    assert (stop.step, stop.best, stop.best_step) == (15, 0.5, 5)
    log.add(stop, request)
    assert (early_stop.evaluated(log.run), log.run.status) == ([], "stopping")
    # The attempt has saved step 20 before it ended.
    log.end(exit_code=0)
    assert (log.run.status, log.run.step, log.run.cause) == ("succeeded", 20, "stopped early")
    assert early_stop.evaluated(log.run) == []


@pytest.mark.parametrize(("mode", "best"), [("max", [10, 15]), ("min", [5, 20])])
def test_the_best_checkpoints_are_those_of_the_metric_and_the_earlier_of_equal_ones(
    mode: str, best: list[int]
) -> None:
    rule = ANSWERS | {"mode": mode, "count": 2}
    log = log_of(evaluation=[COMMAND], checkpoint__keep_best=rule, trainer__early_stop=None)
    for step, score in ((5, 0.1), (10, 0.9), (15, 0.8), (20, 0.2), (25, 0.8)):
        until(log, step, 1.0)
        evaluate(log, step, score)
    kept = {step for step, why in retention.why_kept(log.run).items() if any("best" in w for w in why)}
    assert sorted(kept) == best
    none = msgspec.structs.replace(log.run.spec.checkpoint, keep_best=0)
    spec = msgspec.structs.replace(log.run.spec, checkpoint=none)
    run = msgspec.structs.replace(log.run, spec=spec)
    assert not any("best" in w for why in retention.why_kept(run).values() for w in why)
