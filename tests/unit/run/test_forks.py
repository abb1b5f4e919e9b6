"""Resumes with another spec, and forks, as histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events
from sftd.domain.run import decisions, retention, trajectory
from sftd.domain.run.decisions import Proposal
from sftd.domain.run.failures import Failure
from sftd.domain.run.success import shortfall
from sftd.domain.spec.parse import change
from sftd.domain.spec.spec import OrderStart
from tests.builders.log.run_log import CRASH, Log

BAD = Failure("bad checkpoint", "manifest.json is missing")


def trained(planned: int = 40, until: int = 30, **overrides: Any) -> Log:
    """A run of checkpoints every 5 steps, at whose attempt's end nothing was left to be said but a crash."""
    log = Log(planned, scheduler__type="constant", trainer__max_steps=planned, **overrides).claim()
    return log.train(until, save_every=5).end(exit_code=0 if until == planned else 1)


def proposal(log: Log, **overrides: Any) -> Proposal:
    new, _ = change(log.run.spec, [(k.replace("__", "."), v) for k, v in overrides.items()])
    return Proposal(new, new.trainer.max_steps or 0, "", "")


def refusal(decide: Callable[..., object], *arguments: Any) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        decide(*arguments)
    assert refused.value.problems[-1].fix
    return refused.value.problems


def forked(parent: Log, step: int | None = None, **overrides: Any) -> Log:
    """A fork as the log has it before its first attempt; its parent's checkpoint is pinned."""
    new = proposal(parent, **overrides)
    event = decisions.fork(parent.run, "ada", step, new)
    log = Log()
    submitted = log.recorded[0].event
    assert isinstance(submitted, events.RunSubmitted)
    log.recorded.clear()
    log.run = type(log.run)("calm-heron-11aa")
    log.add(
        event,
        msgspec.structs.replace(
            submitted, spec=msgspec.to_builtins(new.spec), planned_steps=new.planned_steps
        ),
    )
    if event.checkpoint:
        parent.add(events.CheckpointPinned(step=event.step, fork=log.run.run_id))
    return log


# Going on with another spec.


def test_a_run_that_has_succeeded_goes_on_with_more_steps_and_must_reach_them() -> None:
    log = trained(planned=20, until=20)
    assert log.run.status == "succeeded"
    log.add(*decisions.request_resume(log.run, "bob", None, proposal(log, trainer__max_steps=30)))
    asked = log.recorded[-1].event
    assert isinstance(asked, events.ResumeRequested)
    assert asked.changes == {"trainer.max_steps": [20, 30]}
    assert (log.run.status, log.run.planned_steps, log.run.spec.trainer.max_steps) == ("queued", 30, 30)
    assert log.run.spec_digest == asked.spec_digest != "s"
    log.claim().train(25)
    assert shortfall(log.run) == "25 of 30 planned steps are in the log"
    log.train(30)
    assert shortfall(log.run) == "the final checkpoint was not published"
    log.save().end(exit_code=0)
    assert (log.run.status, log.run.steps_redone) == ("succeeded", 0)


def test_a_run_may_end_at_a_checkpoint_that_it_has_but_not_before() -> None:
    log = trained(until=27)
    [problem] = refusal(decisions.request_resume, log.run, "bob", None, proposal(log, trainer__max_steps=24))
    assert (problem.where, problem.what) == (
        "trainer.max_steps",
        "24 steps are fewer than the 25 from which the run continues",
    )
    assert "0, 5, 10, 15, 20, 25" in problem.fix
    log.add(*decisions.request_resume(log.run, "bob", None, proposal(log, trainer__max_steps=25)))
    assert log.claim().end(exit_code=0).run.status == "succeeded"


def test_each_guilty_key_is_named_and_the_fork_that_does_it() -> None:
    log = trained(scheduler__warmup_steps=3)
    new = proposal(log, optimizer__lr=1.0, data__train_batch_size=2, launch__nproc_per_node=2)
    problems = refusal(decisions.request_resume, log.run, "bob", None, new, "sftd fork …")
    assert [p.where for p in problems] == ["data.train_batch_size", "optimizer.lr"]
    assert problems[-1].fix == "fork the run instead: sftd fork …"
    longer = Log(40, trainer__max_steps=40).claim().train(20, save_every=5).end()
    [problem] = refusal(
        decisions.request_resume,
        longer.run,
        "bob",
        None,
        proposal(longer, trainer__max_steps=50),
        "sftd fork …",
    )
    assert problem.what.endswith("and its 20 steps used learning rates for 40 steps")


def test_other_data_is_another_run_wherever_the_files_lie() -> None:
    log = trained()
    new = proposal(log, data__train_files=["/moved"])
    [problem] = refusal(
        decisions.request_resume,
        log.run,
        "bob",
        None,
        msgspec.structs.replace(new, train_digest="other"),
        "fork",
    )
    assert "contents of the files changed" in problem.what
    decisions.request_resume(log.run, "bob", None, new)


def test_the_same_spec_again_is_a_resume_like_any_other() -> None:
    log = trained()
    [event] = decisions.request_resume(log.run, "bob", None, proposal(log))
    assert event == events.ResumeRequested(by="bob")


# Forks.


def test_what_a_queued_resume_will_write_anew_is_no_start_for_a_fork() -> None:
    parent = trained()
    parent.add(*decisions.request_resume(parent.run, "ada", 10))
    [problem] = refusal(decisions.fork_point, parent.run, 20)
    assert "is superseded" in problem.what
    point = decisions.fork_point(parent.run, None)
    assert point is not None
    assert point.step == 10
    # Called off, nothing goes back.
    parent.add(*decisions.request_stop(parent.run, "ada"))
    assert decisions.fork_point(parent.run, 20) is not None


def test_a_checkpoint_that_the_parent_rejects_and_publishes_again_stays_the_forks() -> None:
    parent = trained(checkpoint__keep_last=1)
    child = forked(parent, 30, trainer__max_steps=60)
    parent.add(decisions.claim(parent.run, "d", "h"))
    parent.add(events.CheckpointRejected(step=30, path="/ck/step-30", reason="EIO")).end(BAD)
    parent.claim().train(40, save_every=5).end(exit_code=0)
    assert retention.why_kept(parent.run)[30] == [f"fork {child.run.run_id} starts from it"]
    assert parent.run.rejected_pins == {}


def test_samples_left_out_right_behind_the_fork_do_not_change_what_was_planned() -> None:
    log = forked(trained(), 10, trainer__max_steps=35)
    planned_from = trajectory.beginning(log.run)
    log.claim().train(12).add(events.SamplesSkipped(step=10, sample=12 * 64, reason="r"))
    assert trajectory.beginning(log.run) == planned_from == OrderStart(10, 640)


@pytest.mark.parametrize("step", [None, 0, 5])
def test_a_fork_begins_where_it_left_its_parent(step: int | None) -> None:
    parent = trained()
    log = forked(parent, step, optimizer__lr=0.5, trainer__max_steps=35)
    start = 30 if step is None else step
    run = log.run
    assert run.fork is not None
    assert (run.fork.parent, run.fork.step, run.first_step) == (parent.run.run_id, start, start)
    assert (run.step, run.highest_step, run.tokens_counted) == (start, start, start * 100)
    assert run.order_start == OrderStart(start, start * 64)
    assert decisions.claim(run, "d", "h").from_step == start
    log.claim().train(32).end()
    assert (log.run.status, log.run.steps_redone) == ("retrying", 0)
    # Nothing was saved: again from where it was forked, and its steps are compared.
    log.claim()
    assert log.run.step == start
    log.train(35).save().end(exit_code=0)
    assert (log.run.status, log.run.steps_redone) == ("succeeded", 32 - start)
    assert log.run.tokens_counted == 3500


def test_what_cannot_be_forked_from_is_said() -> None:
    log = trained()
    [absent] = refusal(decisions.fork, log.run, "ada", 7, proposal(log))
    assert "is missing" in absent.what
    assert absent.fix == "use one of 0, 5, 10, 15, 20, 25, 30"
    log.add(*decisions.request_resume(log.run, "ada", 10)).claim()
    [superseded] = refusal(decisions.fork, log.run, "ada", 15, proposal(log))
    assert "is superseded" in superseded.what
    assert superseded.fix == "use one of 0, 5, 10"
    [empty] = refusal(decisions.fork, Log().run, "ada", None, proposal(Log(), trainer__max_steps=9))
    assert "or start from the pretrained model: --from-step 0" in empty.fix
    [short] = refusal(decisions.fork, log.run, "ada", 10, proposal(log, trainer__max_steps=10))
    assert "trainer.max_steps=20" in short.fix


def test_a_fork_never_begins_anew() -> None:
    parent = trained()
    log = forked(parent, 10, trainer__max_steps=35).add(decisions.claim(parent.run, "d", "h"))
    log.add(events.CheckpointRejected(step=10, path="/ck/step-10", reason="bit rot")).end(BAD)
    assert log.run.status == "failed"
    assert f"step 10 of {parent.run.run_id}, cannot be used: manifest.json" in str(log.run.message)
    for step in (None, 0, 10):
        [problem] = refusal(decisions.request_resume, log.run, "ada", step)
        assert "cannot be used" in problem.what
        assert f"sftd checkpoints {parent.run.run_id}" in problem.fix


def test_a_fork_with_a_checkpoint_of_its_own_goes_on_from_it() -> None:
    log = forked(trained(), 10, trainer__max_steps=35).claim().train(15, save_every=5).end()
    log.claim().add(events.CheckpointRejected(step=10, path="/ck/step-10", reason="bit rot")).end(BAD)
    assert log.run.status == "retrying"
    assert decisions.claim(log.run, "d", "h").from_step == 15
    [problem] = refusal(decisions.request_resume, log.run, "ada", 0)
    assert problem.fix == "use one of 15"


def test_a_fork_of_a_fork_has_its_parents_steps_only() -> None:
    child = forked(trained(), 10, trainer__max_steps=35).claim().train(20, save_every=5).end()
    grandchild = forked(child, 15, trainer__max_steps=40)
    assert (grandchild.run.first_step, grandchild.run.order_start) == (15, OrderStart(15, 15 * 64))
    [problem] = refusal(decisions.fork, child.run, "ada", 0, proposal(child))
    assert problem.fix == "use one of 10, 15, 20"


def test_what_a_fork_starts_from_is_kept_for_ever() -> None:
    parent = trained(planned=30, checkpoint__keep_last=1)
    child = forked(parent, 10, trainer__max_steps=35, checkpoint__keep_last=1)
    name = child.run.run_id
    assert retention.why_kept(parent.run)[10] == [f"fork {name} starts from it"]
    assert [c.step for c in retention.deletable(parent.run)] == [5, 15, 20, 25]
    child.claim().train(35, save_every=5).end(exit_code=0)
    assert "the parent's: not this run's to delete" in retention.why_kept(child.run)[10]
    assert [c.step for c in retention.deletable(child.run)] == [15, 20, 25, 30]
    [problem] = refusal(decisions.request_resume, parent.run, "ada", 5)
    assert problem.what == f"would overwrite step 10, the fork point of {name}"
    parent.add(*decisions.request_resume(parent.run, "ada", 10))
    assert decisions.claim(parent.run, "d", "h").from_step == 10


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([5, 10, 15, 20, 25, 30])), max_size=12))
def test_no_history_deletes_what_a_fork_starts_from(moves: list[tuple[bool, int]]) -> None:
    """Forks, resumes from earlier steps and collections in any order."""
    log = trained(planned=30, checkpoint__keep_last=1)
    pinned: set[int] = set()
    for fork, step in moves:
        try:
            if fork:
                forked(log, step, trainer__max_steps=60)
                pinned.add(step)
            else:
                log.add(*decisions.request_resume(log.run, "ada", step))
                log.claim().train(30, save_every=5).end(exit_code=0)
        except Refused:
            continue
        for c in retention.deletable(log.run):
            log.add(events.CheckpointDeleted(step=c.step, path=c.path, bytes=1, reason="retention"))
        assert pinned <= {c.step for c in log.run.checkpoints if not c.superseded}
    assert log.run.status == "succeeded"
    assert trajectory.beginning(log.run) == OrderStart()


def test_a_crash_is_still_retried() -> None:
    log = forked(trained(), 10, trainer__max_steps=35).claim().train(12).end(CRASH)
    assert log.run.status == "retrying"
