"""Random stories of a run, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from sftd.domain.errors import Refused
from sftd.domain.log import events
from sftd.domain.run import decisions, retention, stops
from sftd.domain.run import state as run_state
from sftd.domain.run.state import ACTIVE, ENDED
from tests.builders.log.run_log import Log, validated

STORY = st.lists(
    st.sampled_from(
        [
            *("train", "save", "validate", "nan", "crash", "claim", "resume", "cancel", "reject", "delete"),
            *("hold", "release", "pause", "preempt"),
        ]
    ),
    max_size=40,
)


def live(story: list[str]) -> Log:
    log = Log(planned=12, launch__max_restarts=3)
    for number, deed in enumerate(story):
        run = log.run
        match deed:
            case "claim" if run.status in run_state.WAITING:
                log.claim()
            case "train" if run.status in ACTIVE and run.step < run.planned_steps:
                log.train(run.step + 1)
            case "save" if run.status in ACTIVE and run.step:
                log.save()
            case "validate" if run.status in ACTIVE:
                log.add(validated(run.step, 1.0 + (number * 7919) % 13))
            case "nan" if run.status in ACTIVE:
                log.add(validated(run.step, float("nan")))
            case "crash" if run.status in ACTIVE:
                log.end()
            case "hold" if run.status in run_state.WAITING:
                log.add(*stops.hold(run, "ada"))
            case "release" if run.status == "held":
                log.add(*stops.release(run, "ada"))
            case "pause" if run.status in ("starting", "running"):
                log.add(*stops.pause(run, "ada"))
            case "preempt":
                log.add(*stops.preempt(run, "urgent", 9))
            case "cancel" if run.status not in ENDED:
                log.add(*decisions.request_stop(run, "ada"))
            case "resume":
                steps = [None, 0, *(c.step for c in run.checkpoints)]
                try:
                    log.add(*decisions.request_resume(run, "ada", steps[number % len(steps)]))
                except Refused:
                    continue
            case "reject" if run.status == "starting" and run.checkpoints:
                last = run.checkpoints[-1]
                log.add(events.CheckpointRejected(step=last.step, path=last.path, reason="r"))
            case "delete":
                for c in retention.deletable(run)[:1]:
                    log.add(events.CheckpointDeleted(step=c.step, path=c.path, bytes=c.bytes, reason="r"))
    return log
