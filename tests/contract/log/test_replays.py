"""Replays on a real database: histories with forks, the state at a moment, what can be trained again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.log.history import AtStep, AtTime, AtVersion, parse_moment
from sftd.domain.run.fold import fold
from sftd.domain.run.state import Run
from sftd.operations.context import Context
from sftd.operations.queries import history, runs
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.queue import leases
from sftd.wire.preflight import Preflight, submission
from tests.builders.log.histories import step
from tests.builders.log.run_log import Log
from tests.builders.log.specs import FACTS, SHAPE, SPEC

PARENT, CHILD, GRANDCHILD = "brave-otter-3f2a", "calm-heron-90ab", "dear-ibis-11cd"
Append = Callable[..., None]


@pytest.fixture
def append(log: Store) -> Append:
    """Appends events to a stream; event n of a stream that starts at `at` happens in second `at` + n."""

    def more(run_id: str, *events: e.Event, attempt: int | None = 1, at: int = 0) -> None:
        with log.write() as tx:
            before = len(event_store.event_types(tx.connection, run_id))
            new = [
                e.NewEvent(
                    event=event,
                    event_id=f"{run_id}/{number}",
                    occurred_at=(at + number) * 1_000_000,
                    actor="test",
                    attempt=attempt,
                )
                for number, event in enumerate(events, before + 1)
            ]
            event_store.append(tx, run_id, before, new, 1)

    return more


def submitted() -> e.RunSubmitted:
    return submission(SPEC, Preflight(SHAPE, FACTS, None, 9, []), [], "ada")


def published(number: int, digest: str, path: str = "") -> e.CheckpointPublished:
    return e.CheckpointPublished(
        step=number, path=path or f"/c/{number}", bytes=1, manifest_digest=digest, seconds=1.0
    )


def forked(parent: str, number: int, digest: str) -> e.RunForked:
    return e.RunForked(
        parent=parent,
        step=number,
        sample=number,
        checkpoint=f"/c/{number}",
        manifest_digest=digest,
        bytes=1,
        tokens_total=number * 10,
        changes={},
        by="ada",
    )


def claimed(number: int) -> e.AttemptClaimed:
    return e.AttemptClaimed(daemon="d", host="h", from_step=number)


@pytest.fixture
def family(append: Append) -> None:
    """A parent that saved step 4 and continued to 6, was resumed from 2 and did 3 and 4 again; a fork from the first step 4
    up to 6, and its fork from step 5."""
    append(PARENT, submitted(), claimed(0), step(1), step(2), published(2, "p2"), step(3), step(4, loss=4.0))
    append(PARENT, published(4, "p4"), step(5), step(6))
    append(
        CHILD, forked(PARENT, 4, "p4"), submitted(), claimed(4), step(5), published(5, "c5"), step(6), at=100
    )
    append(PARENT, claimed(2), step(3), step(4, loss=4.5), published(4, "p4 anew"), attempt=2, at=200)
    append(GRANDCHILD, forked(CHILD, 5, "c5"), submitted(), claimed(5), step(6), at=300)


@pytest.mark.parametrize("deeds", [0, 3, 7])
def test_the_state_at_the_end_is_what_is_shown(log: Store, append: Append, deeds: int) -> None:
    told = Log(planned=40).claim().train(4).save().train(deeds + 4).end().claim().train(6)
    for r in told.recorded:
        append(PARENT, r.event, attempt=r.attempt)
    (chapter,) = history.chapters(log, PARENT[:5])
    assert msgspec.json.encode(chapter.run()) == msgspec.json.encode(runs.find_run(log, PARENT))
    run = Run(PARENT)
    for r in chapter.recorded:
        run = fold(run, [r])
        (then,) = history.until([chapter], AtVersion(r.version))
        assert then.run() == run


@pytest.mark.usefixtures("family")
def test_a_forks_history_begins_with_its_parents(log: Store) -> None:
    story = history.chapters(log, GRANDCHILD)
    assert [(c.run_id, c.last_step) for c in story] == [(PARENT, 4), (CHILD, 5), (GRANDCHILD, None)]

    def at(moment: str) -> Run:
        return history.until(story, parse_moment(moment, 0))[-1].run()

    # As the parent was when it saved, not as it was redone afterwards.
    assert (at("4").run_id, at("5").run_id, at("6").run_id) == (CHILD, GRANDCHILD, GRANDCHILD)
    assert (at("3").run_id, at("3").step, at("3").attempt) == (PARENT, 3, 1)
    assert at("4").step == 4
    assert at("4").status == "starting"
    assert history.chapters(log, CHILD)[0].recorded[-1].event == published(4, "p4")
    # Before the fork was made, its history is the parent's.
    early = history.until(story, AtTime(4_000_000))[-1]
    assert (early.run_id, early.run().step) == (PARENT, 2)
    with pytest.raises(Refused, match="had not been submitted then"):
        history.until(story, AtTime(1))
    assert history.until(story, AtStep(6))[-1].recorded[-1].event == step(6)
    assert history.chapter_of_step(story, 5).run_id == CHILD


@pytest.mark.usefixtures("family")
def test_a_parent_that_is_elsewhere_is_left_out(log: Store, append: Append) -> None:
    append("lone-fox-0000", forked("gone-cat-0000", 4, "g4"), submitted(), attempt=None)
    story = history.chapters(log, "lone")
    assert [c.run_id for c in story] == ["lone-fox-0000"]
    assert history.until(story, AtStep(4))[-1].run().step == 4
    with pytest.raises(Refused, match="step 3 is not in the log"):
        history.until(story, AtStep(3))


@pytest.mark.usefixtures("family")
def test_what_is_compared_is_the_timeline_from_a_checkpoint_that_is_here(
    log: Store, append: Append, tmp_path: Path
) -> None:
    chosen = history.plan(log, PARENT)
    # No checkpoint of it is on this host, and the pretrained model always is.
    assert (chosen.from_step, chosen.to_step, chosen.checkpoint, chosen.count) == (0, 4, None, 4)
    assert chosen.log[4].event.loss == 4.5
    assert history.plan(log, PARENT, to_step=3).run.step == 3
    with pytest.raises(Refused, match="not on this host"):
        history.plan(log, PARENT, from_step=2)
    with pytest.raises(Refused, match="not in the timeline"):
        history.plan(log, PARENT, to_step=6)
    append(PARENT, step(5), published(5, "p5", str(tmp_path)), step(6), attempt=2, at=200)
    chosen = history.plan(log, PARENT)
    assert (chosen.from_step, chosen.to_step) == (5, 6)
    assert chosen.checkpoint is not None
    assert chosen.checkpoint.manifest_digest == "p5"
    # A fork's steps begin after its parent's checkpoint.
    with pytest.raises(Refused, match="no checkpoint before step 6 is on this host"):
        history.plan(log, CHILD)
    with pytest.raises(Refused) as refused:
        history.plan(log, CHILD, from_step=0)
    assert refused.value.problems[0].fix == "one of: none"
    append("shy-elk-0000", submitted(), attempt=None)
    with pytest.raises(Refused, match="has recorded no step"):
        history.plan(log, "shy-elk-0000")


@pytest.mark.usefixtures("family")
def test_the_spec_is_that_of_the_last_compared_step(log: Store, append: Append) -> None:
    changed = msgspec.to_builtins(SPEC) | {"trainer": {"max_steps": 20}}
    append(
        PARENT,
        e.ResumeRequested(by="ada", changes={"trainer.max_steps": [9, 20]}, spec=changed, planned_steps=20),
        claimed(4),
        step(5),
        attempt=3,
        at=300,
    )
    assert history.plan(log, PARENT).run.planned_steps == 20
    assert history.plan(log, PARENT, to_step=4).run.planned_steps == 9


@pytest.mark.usefixtures("family")
def test_an_outcome_is_recorded_whatever_came_meanwhile(log: Store, append: Append) -> None:
    chosen = history.plan(log, PARENT)
    append(PARENT, step(5), attempt=2)
    verdict = e.ReplayVerified(from_step=0, to_step=4, is_exact=True, environment={}, by="ada")
    history.record(log, Context(actor="test"), PARENT, verdict)
    run = runs.find_run(log, PARENT)
    assert run.version == chosen.log[4].version + 3
    assert run.last_replay is not None
    assert run.last_replay.diverged_at is None


@pytest.mark.usefixtures("family")
def test_gpus_of_living_attempts_are_not_taken(log: Store, append: Append) -> None:
    append(
        PARENT,
        e.AttemptLaunched(pid=1, create_time=1.0, host="h", directory="/a", argv=[], devices=["cuda:1"]),
        attempt=2,
        at=300,
    )
    with log.write() as tx:
        leases.enqueue(tx, PARENT, 0, 1)
        leases.lease(tx, PARENT, 2, "token", "d", 10)
    assert history.plan(log, PARENT, host="h").held == ["cuda:1"]
    assert history.plan(log, PARENT, host="another").held == []
