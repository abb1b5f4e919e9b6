"""Of which checkpoints only the weights stay, and what keeps a checkpoint while somebody is about to need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.plan.disk import storage
from sftd.domain.run import decisions, retention
from sftd.domain.run.failures import Failure
from sftd.domain.run.state import ForkPoint, Run
from tests.builders.log.run_log import Log, validated
from tests.builders.log.specs import SHAPE


def succeeded(**overrides: Any) -> Run:
    """Saved at 5, 10, 15 and 20; 10 is the best."""
    log = Log(planned=20, checkpoint__keep_last=2, checkpoint__keep_best=1, **overrides).claim()
    for number, loss in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 2.5)):
        log.train(number).add(validated(number, loss)).save()
    assert retention.reducible(log.run) == []
    run = log.end(exit_code=0).run
    assert run.status == "succeeded"
    return run


@pytest.mark.parametrize("losses", [range(1, 13), range(12, 0, -1), (5, 1, 9, 2, 8, 3, 7, 4, 6, 12, 11, 10)])
@pytest.mark.parametrize(
    ("last", "every", "best"), [(1, 0, 0), (2, 0, 3), (1, 20, 1), (3, 15, 2), (20, 0, 1)]
)
def test_a_run_keeps_no_more_than_its_plan_counts(
    losses: Sequence[int], last: int, every: int, best: int
) -> None:
    """A checkpoint that no rule keeps is deleted after each save; the plan counts the rules with the worst order of losses."""
    log = Log(
        planned=60,
        checkpoint__keep_last=last,
        checkpoint__keep_every=every,
        checkpoint__keep_best=best,
        trainer__save_interval=5,
        data__val_files=["v"],
    )
    planned = storage(log.run.spec, SHAPE, 60, "bfloat16")
    log.claim()
    most = 0
    for number, loss in enumerate(losses, 1):
        log.train(5 * number).add(validated(5 * number, float(loss))).save()
        most = max(most, len(log.run.checkpoints))
        for c in retention.deletable(log.run):
            log.add(e.CheckpointDeleted(step=c.step, path=c.path, bytes=c.bytes, reason="r"))
    kept = len(log.run.checkpoints)
    assert (kept <= planned.kept, most <= planned.most, planned.saved) == (True, True, len(losses))
    if losses[0] == 1 and not every:
        # The first ones stay the best: nothing needs more.
        assert (kept, most) == (planned.kept, planned.most)


def reducible(run: Run) -> list[int]:
    return [c.step for c in retention.reducible(run)]


@pytest.mark.parametrize(("choice", "expected"), [("all", []), ("last", [10]), ("weights", [10, 15, 20])])
def test_what_is_kept_for_its_weights_alone(choice: str, expected: list[int]) -> None:
    assert reducible(succeeded(checkpoint__after_success=choice)) == expected


def test_a_best_that_another_rule_keeps_stays_whole() -> None:
    assert reducible(succeeded(checkpoint__keep_every=10)) == []


@pytest.mark.parametrize("change", [{"weights_only": True}, {"is_parents": True}, {"forks": ("young-fox",)}])
def test_what_has_its_weights_alone_or_is_needed_by_another_run_is_not_reduced(
    change: dict[str, Any],
) -> None:
    run = succeeded(checkpoint__after_success="weights")
    changed = tuple(msgspec.structs.replace(c, **change) if c.step == 15 else c for c in run.checkpoints)
    assert reducible(msgspec.structs.replace(run, checkpoints=changed)) == [10, 20]
    reasons = retention.why_kept(msgspec.structs.replace(run, checkpoints=changed))[15]
    assert ("fork young-fox starts from it" in reasons) == ("forks" in change)
    assert any("parent" in reason for reason in reasons) == ("is_parents" in change)


def test_a_fork_keeps_what_no_rule_keeps() -> None:
    run = succeeded()
    assert [c.step for c in retention.deletable(run)] == [5]
    forked = tuple(
        msgspec.structs.replace(c, forks=("a", "b")) if c.step == 5 else c for c in run.checkpoints
    )
    run = msgspec.structs.replace(run, checkpoints=forked)
    assert retention.why_kept(run)[5] == ["fork a starts from it", "fork b starts from it"]
    assert retention.deletable(run) == []


def test_what_a_resume_was_asked_to_start_from_is_kept() -> None:
    log = Log(planned=20, checkpoint__keep_last=1).claim().train(15, save_every=5)
    log.end(Failure("user error", "m"))
    assert log.run.status == "failed"
    log.add(*decisions.request_resume(log.run, "ada", 5))
    assert "about to be resumed from" in retention.why_kept(log.run)[5]
    assert 5 not in [c.step for c in retention.deletable(log.run)]
    # Without a resume, nothing is.
    assert all("about to be resumed from" not in r for r in retention.why_kept(succeeded()).values())


def test_a_resume_starts_from_the_newest_checkpoint_that_is_left() -> None:
    run = Log().claim().train(15, save_every=5).end().run

    def instead(gone: set[int], asked: int | None = None, of: Run = run) -> int | None:
        return decisions.without_missing(of, asked, frozenset(gone))

    def fix(gone: set[int], asked: int | None = None, of: Run = run) -> str:
        with pytest.raises(Refused) as refused:
            instead(gone, asked, of)
        return refused.value.problems[0].fix

    assert [instead(gone) for gone in (set(), {5}, {15}, {10, 15}, {5, 10, 15})] == [None, None, 10, 5, 0]
    assert instead({5}, asked=10) == 10
    assert "0, 5, 15" in fix({10}, asked=10)
    # A fork has its parent's checkpoint and nothing before it.
    forked = msgspec.structs.replace(run, fork=ForkPoint("p", 3, 9))
    assert [instead(gone, of=forked) for gone in ({15}, {10, 15})] == [10, 5]
    assert "one of 5, 15" in fix({10}, asked=10, of=forked)
    assert fix({5, 10, 15}, of=forked)
    assert "put its folder back" in fix({5, 10, 15}, asked=10, of=forked)
