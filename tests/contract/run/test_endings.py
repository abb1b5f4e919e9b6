"""What the log holds of a run, however it ends: every event, in order, with every field, and the run's place in the queue.

Each ending is a story: people and a daemon call the operations. The story returns what the log must hold,
written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from sftd.domain.log import events as e
from sftd.domain.queue.demand import Need
from sftd.domain.run.decisions import Proposal
from sftd.domain.run.failures import Cause, Failure, Interruption
from sftd.domain.run.state import ENDED
from sftd.domain.spec.sections import Launch, Trainer, Training
from sftd.domain.spec.spec import OrderStart, spec_digest
from sftd.operations.commands import hold, lifecycle, remove
from sftd.operations.commands import submit as submit_runs
from sftd.operations.commands.submit import Wish
from sftd.operations.driving import attempts, turns
from sftd.operations.queries.runs import find_run
from sftd.projections import views
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.queue import leases, order
from sftd.wire.attempt import journal
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import Line
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import Clock
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC

FOUND = Preflight(SHAPE, FACTS, None, 3, [])
BACKOFF = 15.0
SECOND = 1_000_000
# Of an event: the attempt to which it belongs, who recorded it, and itself.
Entry = tuple[int | None, str, e.Event]
LAUNCHED = e.AttemptLaunched(
    pid=7, create_time=1.5, host="h", directory="/d", argv=["torchrun"], devices=["cuda:3"]
)


def published(number: int) -> e.CheckpointPublished:
    return e.CheckpointPublished(
        step=number, path=f"/c/{number}", bytes=5, manifest_digest=f"m{number}", seconds=0.5
    )


def by_us(attempt: int | None, *events: e.Event) -> list[Entry]:
    return [(attempt, "test", event) for event in events]


def by_trainer(attempt: int, *events: e.Event) -> list[Entry]:
    return [(attempt, "trainer", event) for event in events]


def claimed(from_step: int = 0) -> e.AttemptClaimed:
    return e.AttemptClaimed(
        daemon="d", host="h", from_step=from_step, checkpoint=f"/c/{from_step}" if from_step else None
    )


class Story:
    """What happens to one run."""

    def __init__(self, log: Store, home: Path) -> None:
        self.log, self.home = log, home
        self.clock = Clock()
        self.run_id = ""
        self.spec = SPEC

    def submit(self, after: tuple[str, ...] = (), training: Training | None = None, **launch: Any) -> Story:
        self.spec = msgspec.structs.replace(SPEC, launch=Launch(**launch), training=training or SPEC.training)
        wish = Wish(self.spec, FOUND)
        (self.run_id,) = submit_runs.submit_all(self.log, self.clock.context, [wish], "ada", after=after)
        return self

    def another(self) -> Story:
        """A story of another run at the same time."""
        other = Story(self.log, self.home)
        other.clock = self.clock
        return other

    def claim(self) -> Story:
        found = attempts.claim(
            self.log,
            self.clock.context,
            daemon="d",
            host="h",
            fits=lambda entry: True if entry.run_id == self.run_id else None,
            lease_micros=LEASE,
        )
        assert found is not None
        assert found.run.run_id == self.run_id
        self.lease, self.line = found.lease, 0
        return self

    def waits(self) -> Story:
        """Nobody can claim it now."""
        found = attempts.claim(
            self.log,
            self.clock.context,
            daemon="d",
            host="h",
            fits=lambda entry: True if entry.run_id == self.run_id else None,
            lease_micros=LEASE,
        )
        assert found is None
        return self

    def launch(self) -> Story:
        attempts.launched(self.log, self.clock.context, self.lease, LAUNCHED)
        return self

    def train(self, *events: e.Event) -> Story:
        """The trainer's journal grows, and is taken in."""
        first = self.line + 1
        lines = [Line(number=n, occurred_at=n, event=event) for n, event in enumerate(events, first)]
        self.line += len(lines)
        before = attempts.steps_before(self.log, self.lease)
        attempts.record(self.log, self.clock.context, self.lease, lines, 10 * self.line, before)
        return self

    def end(
        self,
        cause: Cause = "killed",
        exit_code: int | None = 1,
        interruption: Interruption | None = None,
        *,
        lost: bool = False,
    ) -> Story:
        attempts.finish(
            self.log,
            self.clock.context,
            self.lease,
            exit_code=exit_code,
            failure=Failure(cause, f"why {cause}", ["line 1", "line 2"]),
            lost=lost,
            backoff_seconds=BACKOFF,
            interruption=interruption,
        )
        return self

    def later(self, seconds: float) -> Story:
        self.clock.time += int(seconds * SECOND)
        return self

    def entries(self) -> list[Entry]:
        """All that the log has of it after its submission."""
        with self.log.read() as connection:
            recorded = list(event_store.read_stream(connection, self.run_id))
        assert [r.version for r in recorded] == list(range(1, len(recorded) + 1))
        start = next(n for n, r in enumerate(recorded) if isinstance(r.event, e.RunSubmitted))
        return [(r.attempt, r.actor, r.event) for r in recorded[start + 1 :]]

    def place(self) -> str:
        """Where it is in the queue, and until when it waits there."""
        with self.log.read() as connection:
            if any(lease.run_id == self.run_id for lease in leases.leases(connection)):
                return "driven"
            found = [entry for entry in order.waiting(connection) if entry.run_id == self.run_id]
        if not found:
            return "gone"
        wait = (found[0].not_before - self.clock.time) / SECOND
        return "held" if found[0].is_held else f"waits {wait:g} s" if wait > 0 else "waits"


Ending = Callable[[Story], list[Entry]]
# By part, then by name: the status and the place in the queue with which it ends, and the story.
ENDINGS: dict[str, dict[str, tuple[str, str, Ending]]] = {}


def ending(name: str, status: str, place: str = "gone") -> Callable[[Ending], Ending]:
    """Register a story in the last part."""

    def register(story: Ending) -> Ending:
        ENDINGS[list(ENDINGS)[-1]][name] = status, place, story
        return story

    return register


def failed(cause: str, retry_at: int | None, exit_code: int | None = 1) -> e.AttemptFailed:
    return e.AttemptFailed(
        cause=cause,
        message=f"why {cause}",
        exit_code=exit_code,
        evidence=["line 1", "line 2"],
        retry_at=retry_at,
    )


# Success.
ENDINGS["success"] = {}


@ending("succeeded", "succeeded")
def _(s: Story) -> list[Entry]:
    s.submit().claim().launch().train(step(1), step(2), step(3), published(3)).end(exit_code=0)
    return [
        *by_us(1, claimed(), LAUNCHED),
        *by_trainer(1, step(1), step(2), step(3), published(3)),
        *by_us(1, e.RunSucceeded(steps=3, tokens=30, final_checkpoint="/c/3")),
    ]


@ending("succeeded although it was asked to stop and ended with an error", "succeeded")
def _(s: Story) -> list[Entry]:
    s.submit().claim().train(step(1), step(2), step(3), published(3))
    lifecycle.cancel(s.log, s.clock.context, s.run_id, "ada")
    s.end(exit_code=1)
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), step(2), step(3), published(3)),
        *by_us(1, e.StopRequested(by="ada"), e.RunSucceeded(steps=3, tokens=30, final_checkpoint="/c/3")),
    ]


@ending("succeeded by its second attempt", "succeeded")
def _(s: Story) -> list[Entry]:
    s.submit().claim().launch().train(step(1), published(1), step(2)).end()
    s.later(BACKOFF).claim().launch()
    resumed = e.TrainingResumed(step=1, path="/c/1", tokens_total=10)
    s.train(resumed, step(2), step(3), published(3)).end(exit_code=0)
    return [
        *by_us(1, claimed(), LAUNCHED),
        *by_trainer(1, step(1), published(1), step(2)),
        *by_us(1, failed("killed", 1_000_000_000 + 15 * SECOND)),
        *by_us(2, claimed(1), LAUNCHED),
        *by_trainer(2, resumed, step(2), step(3), published(3)),
        *by_us(2, e.RunSucceeded(steps=3, tokens=30, final_checkpoint="/c/3")),
    ]


@ending("redone steps that differ from the log", "succeeded")
def _(s: Story) -> list[Entry]:
    """The first after the checkpoint, and the last that was recorded. Each anomaly follows its step."""
    s.submit().claim().train(step(1), published(1), step(2), step(3)).end()
    s.later(BACKOFF).claim().train(step(2, loss=1.5), step(3, loss=2.5), published(3)).end(exit_code=0)
    second, third = (
        e.AnomalyDetected(
            step=number,
            what="redone step differs from the log",
            detail={"loss": {"recorded": 1.0, "redone": loss}},
        )
        for number, loss in ((2, 1.5), (3, 2.5))
    )
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), published(1), step(2), step(3)),
        *by_us(1, failed("killed", 1_015_000_000)),
        *by_us(2, claimed(1)),
        *by_trainer(2, step(2, loss=1.5)),
        *by_us(2, second),
        *by_trainer(2, step(3, loss=2.5)),
        *by_us(2, third),
        *by_trainer(2, published(3)),
        *by_us(2, e.RunSucceeded(steps=3, tokens=30, final_checkpoint="/c/3")),
    ]


@ending("taken over by another daemon, and succeeded", "succeeded")
def _(s: Story) -> list[Entry]:
    s.submit().claim().launch().train(step(1))
    adopted = e.AttemptAdopted(daemon="d2", host="h2", pid=9)
    s.lease = attempts.adopt(s.log, s.clock.context, s.lease, adopted, LEASE)
    s.train(step(2), step(3), published(3)).end(exit_code=0)
    return [
        *by_us(1, claimed(), LAUNCHED),
        *by_trainer(1, step(1)),
        *by_us(1, adopted),
        *by_trainer(1, step(2), step(3), published(3)),
        *by_us(1, e.RunSucceeded(steps=3, tokens=30, final_checkpoint="/c/3")),
    ]


# Failure.
ENDINGS["failure"] = {}


def _ends_by(cause: Cause) -> Ending:
    def story(s: Story) -> list[Entry]:
        s.submit().claim().train(step(1)).end(cause, 3)
        if cause in _HOPELESS:
            last: list[e.Event] = [failed(cause, None, 3), e.RunFailed(cause=cause, message=f"why {cause}")]
        else:
            last = [failed(cause, 1_015_000_000, 3)]
        return [*by_us(1, claimed()), *by_trainer(1, step(1)), *by_us(1, *last)]

    return story


_HOPELESS = ("user error", "not a number", "loss spike")
for _cause in get_args(Cause):
    _what = ("failed", "gone") if _cause in _HOPELESS else ("retrying", "waits 15 s")
    ending(f"ended by {_cause}", *_what)(_ends_by(_cause))


@ending("lost", "retrying", "waits 15 s")
def _(s: Story) -> list[Entry]:
    s.submit().claim().train(step(1)).end("killed", None, lost=True)
    lost = e.AttemptLost(message="why killed", retry_at=1_015_000_000)
    return [*by_us(1, claimed()), *by_trainer(1, step(1)), *by_us(1, lost)]


@ending("ended without an error before its work was done", "retrying", "waits 15 s")
def _(s: Story) -> list[Entry]:
    s.submit().claim().train(step(1), step(2), step(3)).end(exit_code=0)
    message = "the trainer ended without an error, but the final checkpoint was not published"
    incomplete = e.AttemptFailed(
        cause="incomplete", message=message, exit_code=0, evidence=[], retry_at=1_015_000_000
    )
    return [*by_us(1, claimed()), *by_trainer(1, step(1), step(2), step(3)), *by_us(1, incomplete)]


@ending("a crash loop", "failed")
def _(s: Story) -> list[Entry]:
    s.submit(max_restarts=2)
    s.claim().end("crash")
    for wait in (15, 30):
        s.later(wait - 0.001).waits().later(0.001).claim().end("crash")
    message = "3 attempts in a row without a new checkpoint; the last: crash: why crash"
    return [
        *by_us(1, claimed(), failed("crash", 1_015_000_000)),
        *by_us(2, claimed(), failed("crash", 1_045_000_000)),
        *by_us(3, claimed(), failed("crash", None), e.RunFailed(cause="crash loop", message=message)),
    ]


@ending("without restarts", "failed")
def _(s: Story) -> list[Entry]:
    s.submit(max_restarts=0).claim().end("crash")
    message = "1 attempts in a row without a new checkpoint; the last: crash: why crash"
    return by_us(1, claimed(), failed("crash", None), e.RunFailed(cause="crash", message=message))


@ending("resumed after it had failed: it has all its restarts again", "retrying", "waits 15 s")
def _(s: Story) -> list[Entry]:
    s.submit(max_restarts=1).claim().end("crash").later(BACKOFF).claim().end("crash")
    lifecycle.resume(s.log, s.clock.context, s.run_id, "bob")
    s.claim().end("crash")
    message = "2 attempts in a row without a new checkpoint; the last: crash: why crash"
    return [
        *by_us(1, claimed(), failed("crash", 1_015_000_000)),
        *by_us(2, claimed(), failed("crash", None), e.RunFailed(cause="crash loop", message=message)),
        *by_us(None, e.ResumeRequested(by="bob")),
        *by_us(3, claimed(), failed("crash", 1_030_000_000)),
    ]


@ending("rolled back behind a loss that is no number", "retrying", "waits 15 s")
def _(s: Story) -> list[Entry]:
    """The samples of the steps after the checkpoint, and of the one that failed, are left out."""
    s.submit(training=Training(on_non_finite="rollback")).claim()
    s.train(step(1), published(1), step(2)).end("not a number")
    batch = s.spec.data.train_batch_size
    reason = "not a number: why not a number"
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), published(1), step(2)),
        *by_us(
            1,
            e.SamplesSkipped(step=1, sample=2 * batch, reason=reason),
            failed("not a number", 1_015_000_000),
        ),
    ]


@ending("rolled back to the pretrained model", "retrying", "waits 30 s")
def _(s: Story) -> list[Entry]:
    """Its next attempt leaves the same samples out, or it would come to the same end."""
    s.submit(training=Training(on_spike="rollback")).claim().train(step(1), step(2)).end("loss spike")
    s.later(BACKOFF).claim()
    start = OrderStart(0, 2 * s.spec.data.train_batch_size)
    assert find_run(s.log, s.run_id).order_start == start
    s.end()
    reason = "loss spike: why loss spike"
    skipped = e.SamplesSkipped(step=start.step, sample=start.sample, reason=reason)
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), step(2)),
        *by_us(1, skipped, failed("loss spike", 1_015_000_000)),
        *by_us(2, claimed(), failed("killed", 1_045_000_000)),
    ]


@ending("a journal that cannot be read", "retrying", "waits 15 s")
def _(s: Story) -> list[Entry]:
    s.submit().claim().train(step(1))
    attempts.reject_journal(s.log, s.clock.context, s.lease, "the journal cannot be read: line 2")
    s.end("crash", None)
    what = e.AnomalyDetected(step=0, what="the journal cannot be read: line 2", detail={})
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1)),
        *by_us(1, what, failed("crash", 1_015_000_000, None)),
    ]


@ending("a fork whose beginning is damaged", "failed")
def _(s: Story) -> list[Entry]:
    """From the pretrained model it would be another run."""
    parent = s.another()
    parent.submit().claim().train(step(1), published(1)).end(exit_code=0)
    s.spec = msgspec.structs.replace(SPEC, trainer=Trainer(max_steps=4))
    found = msgspec.structs.replace(FOUND, planned_steps=4)
    s.run_id = lifecycle.fork(s.log, s.clock.context, parent.run_id, 1, s.spec, found, [], "ada")
    rejected = e.CheckpointRejected(step=1, path="/c/1", reason="a file is short")
    s.claim().train(rejected).end("bad checkpoint")
    message = (
        f"the checkpoint from which it was forked, step 1 of {parent.run_id}, cannot be used: "
        "why bad checkpoint"
    )
    pin = e.CheckpointPinned(step=1, fork=s.run_id)
    assert parent.entries()[-1] == (None, "test", pin)
    return [
        *by_us(1, claimed(1)),
        *by_trainer(1, rejected),
        *by_us(1, failed("bad checkpoint", None), e.RunFailed(cause="bad checkpoint", message=message)),
    ]


# A person ends it.
ENDINGS["people"] = {}


def _waiting(name: str, s: Story) -> list[Entry]:
    """Bring a run into a state without an attempt. Returns what the log says of that."""
    s.submit()
    if name == "held":
        hold.hold(s.log, s.clock.context, s.run_id, "bob", "not today")
        return by_us(None, e.RunHeld(by="bob", reason="not today"))
    if name == "retrying":
        s.claim().end()
        return by_us(1, claimed(), failed("killed", 1_015_000_000))
    if name == "paused":
        s.claim().train(step(1), published(1))
        hold.pause(s.log, s.clock.context, s.run_id, "bob", "lunch")
        s.end(exit_code=0)
        return [
            *by_us(1, claimed()),
            *by_trainer(1, step(1), published(1)),
            *by_us(
                1,
                e.StopRequested(by="bob", reason="lunch", then="paused"),
                e.AttemptPaused(step=1, by="bob"),
            ),
        ]
    return []


def _cancelled_while(name: str) -> Ending:
    def story(s: Story) -> list[Entry]:
        begun = _waiting(name, s)
        lifecycle.cancel(s.log, s.clock.context, s.run_id, "ada", "wrong data")
        attempt = 1 if name in ("retrying", "paused") else None
        stop = e.StopRequested(by="ada", reason="wrong data", then="cancelled", now=False)
        return [*begun, *by_us(attempt, stop, e.RunCancelled(by="ada"))]

    return story


for _name in ("queued", "held", "retrying", "paused"):
    ending(f"cancelled while it is {_name}", "cancelled")(_cancelled_while(_name))


@ending("asked to stop", "stopping", "driven")
def _(s: Story) -> list[Entry]:
    """The same request again is not recorded, a harder one is."""
    s.submit().claim().train(step(1))
    for now in (False, False, True, True, False):
        lifecycle.cancel(s.log, s.clock.context, s.run_id, "ada", "wrong data", now=now)
    soft, hard = (e.StopRequested(by="ada", reason="wrong data", now=now) for now in (False, True))
    return [*by_us(1, claimed()), *by_trainer(1, step(1)), *by_us(1, soft, hard)]


@ending("cancelled while it trains", "cancelled")
def _(s: Story) -> list[Entry]:
    """The request decides, however the attempt ended."""
    s.submit().claim().train(step(1))
    lifecycle.cancel(s.log, s.clock.context, s.run_id, "ada")
    s.train(published(1)).end("crash", 1, Interruption("preempted", "Slurm preempted job 7"))
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1)),
        *by_us(1, e.StopRequested(by="ada")),
        *by_trainer(1, published(1)),
        *by_us(1, e.RunCancelled(by="ada")),
    ]


@ending("paused behind its checkpoint", "paused")
def _(s: Story) -> list[Entry]:
    """The step is that of the checkpoint, not the last one."""
    s.submit().claim().train(step(1), published(1), step(2))
    hold.pause(s.log, s.clock.context, s.run_id, "bob")
    s.end("hang", None)
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), published(1), step(2)),
        *by_us(1, e.StopRequested(by="bob", then="paused"), e.AttemptPaused(step=1, by="bob")),
    ]


@ending("given up", "cancelled")
def _(s: Story) -> list[Entry]:
    s.submit().claim().launch().train(step(1)).later(LEASE / SECOND + 1)
    lifecycle.abandon(s.log, s.clock.context, s.run_id, "ada")
    return [
        *by_us(1, claimed(), LAUNCHED),
        *by_trainer(1, step(1)),
        *by_us(1, e.AttemptLost(message="given up by ada"), e.RunCancelled(by="ada")),
    ]


@ending("held, released and held again", "held", "held")
def _(s: Story) -> list[Entry]:
    s.submit().claim().end()
    hold.hold(s.log, s.clock.context, s.run_id, "bob", "not today")
    hold.hold(s.log, s.clock.context, s.run_id, "bob", "not today")
    hold.release(s.log, s.clock.context, s.run_id, "ada")
    assert s.place() == "waits 15 s"
    hold.hold(s.log, s.clock.context, s.run_id, "bob")
    return [
        *by_us(1, claimed(), failed("killed", 1_015_000_000)),
        *by_us(None, e.RunHeld(by="bob", reason="not today"), e.RunReleased(by="ada"), e.RunHeld(by="bob")),
    ]


@ending("waited in vain", "cancelled")
def _(s: Story) -> list[Entry]:
    """For a run that failed, or for one that waited for it; one that a person holds, too."""
    first, second, held = s.another().submit(), s.another(), s.another()
    second.submit(after=(first.run_id,))
    held.submit(after=(first.run_id,))
    hold.hold(s.log, s.clock.context, held.run_id, "bob")
    s.submit(after=(second.run_id,))
    first.claim().end("user error")
    assert find_run(s.log, first.run_id).status == "failed"
    end = e.RunCancelled(by="sftd")
    reason = f"waits for {first.run_id}, which has failed"
    stop = e.StopRequested(by="sftd", reason=reason)
    deferred = e.RunDeferred(after=[first.run_id])
    assert second.entries() == by_us(None, deferred, stop, end)
    assert held.entries() == by_us(None, deferred, e.RunHeld(by="bob"), stop, end)
    assert (second.place(), held.place()) == ("gone", "gone")
    assert s.place() == "gone"
    # A person resumes it: it still waits for what has failed.
    lifecycle.resume(s.log, s.clock.context, second.run_id, "ada")
    second.waits()
    lifecycle.cancel(s.log, s.clock.context, second.run_id, "ada")
    reason = f"waits for {second.run_id}, which was cancelled"
    return by_us(None, e.RunDeferred(after=[second.run_id]), e.StopRequested(by="sftd", reason=reason), end)


@ending("removed", "cancelled")
def _(s: Story) -> list[Entry]:
    parent = s.another()
    parent.submit().claim().train(step(1), published(1)).end(exit_code=0)
    s.spec = msgspec.structs.replace(SPEC, trainer=Trainer(max_steps=4))
    found = msgspec.structs.replace(FOUND, planned_steps=4)
    s.run_id = lifecycle.fork(s.log, s.clock.context, parent.run_id, 1, s.spec, found, [], "ada")
    s.claim().train(step(2), published(2))
    lifecycle.cancel(s.log, s.clock.context, s.run_id, "ada")
    s.end(exit_code=0)
    remove.remove(s.log, s.clock.context, s.home, s.run_id, "bob")
    unpinned = e.CheckpointUnpinned(step=1, fork=s.run_id)
    assert parent.entries()[-1] == (None, "test", unpinned)
    assert not find_run(s.log, parent.run_id).pins
    return [
        *by_us(1, claimed(1)),
        *by_trainer(1, step(2), published(2)),
        *by_us(1, e.StopRequested(by="ada"), e.RunCancelled(by="ada")),
        *by_us(
            None,
            # The parent's checkpoint is not the fork's.
            e.CheckpointDeleted(step=2, path="/c/2", bytes=5, reason="removed"),
            e.RunRemoved(by="bob", freed_bytes=0),
        ),
    ]


@ending("resumed with another priority, from an earlier step", "queued", "waits")
def _(s: Story) -> list[Entry]:
    s.submit(max_restarts=0).claim().train(step(1), published(1), step(2), published(2)).end("crash")
    other = msgspec.structs.replace(s.spec, launch=Launch(priority=7, preemptible=True, max_restarts=0))
    lifecycle.resume(s.log, s.clock.context, s.run_id, "bob", 1, Proposal(other, 3, "d", ""))
    with s.log.read() as connection:
        (entry,) = [entry for entry in order.waiting(connection) if entry.run_id == s.run_id]
    assert (entry.priority, entry.demand.preemptible) == (7, True), (
        "the queue goes by what the resume asks for"
    )
    requested = e.ResumeRequested(
        by="bob",
        from_step=1,
        changes={"launch.priority": [0, 7], "launch.preemptible": [False, True]},
        spec=msgspec.to_builtins(other),
        spec_digest=spec_digest(other),
        planned_steps=3,
    )
    # A new checkpoint is progress: without restarts, too, it tries again.
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), published(1), step(2), published(2)),
        *by_us(1, failed("crash", 1_015_000_000)),
        *by_us(None, requested),
    ]


# Others take its devices.
ENDINGS["others"] = {}


@ending("made room for a run of higher priority", "queued", "waits")
def _(s: Story) -> list[Entry]:
    """It waits in its old place, at once, and nothing of it is a failure."""
    s.submit(preemptible=True, max_restarts=0).claim().train(step(1), published(1), step(2))
    head = s.another().submit(priority=5)
    gone = turns.preempt(
        s.log,
        s.clock.context,
        daemon="d",
        fits=lambda entry: False if entry.run_id == head.run_id else None,
        need=lambda demand: Need("cuda", 1, 1),
        free=lambda kind: 0,
        limits=turns.NO_LIMITS,
        silent_micros=LEASE,
    )
    assert gone == [s.run_id]
    s.end("killed", None, lost=True)
    reason = f"makes room for {head.run_id}, which has priority 5"
    return [
        *by_us(1, claimed()),
        *by_trainer(1, step(1), published(1), step(2)),
        *by_us(
            1,
            e.StopRequested(by="sftd", reason=reason, then="queued", preempted_by=head.run_id),
            e.AttemptPreempted(step=1, by_run=head.run_id, reason=""),
        ),
    ]


def _interrupted(kind: Any, *, trained: bool) -> Ending:
    def story(s: Story) -> list[Entry]:
        s.submit(launcher="slurm").claim()
        attempts.job_reported(
            s.log, s.clock.context, s.lease, e.JobReported(job="7", state="RUNNING", nodes="n1")
        )
        if trained:
            s.train(step(1), published(1))
        s.end("killed", None, Interruption(kind, "Slurm said so"), lost=True)
        back = 1 if trained else 0
        if kind == "cancelled":
            end: e.Event = e.AttemptPaused(step=back, by="Slurm said so")
        elif kind == "time limit" and not trained:
            # Within it nothing is achieved: that is a failure, and not the attempt's being lost.
            end = e.AttemptFailed(
                cause="time limit",
                message="Slurm said so",
                exit_code=None,
                evidence=["line 1", "line 2"],
                retry_at=1_015_000_000,
            )
        else:
            end = e.AttemptPreempted(step=back, by_run="", reason="Slurm said so")
        lines = (step(1), published(1)) if trained else ()
        reported = e.JobReported(job="7", state="RUNNING", reason="", nodes="n1")
        return [*by_us(1, claimed(), reported), *by_trainer(1, *lines), *by_us(1, end)]

    return story


for _kind, _trained, _status, _place in (
    ("preempted", True, "queued", "waits"),
    ("preempted", False, "queued", "waits"),
    ("requeued", False, "queued", "waits"),
    ("time limit", True, "queued", "waits"),
    ("time limit", False, "retrying", "waits 15 s"),
    ("cancelled", True, "paused", "gone"),
):
    _name = f"Slurm: {_kind}" + (" behind a checkpoint" if _trained else "")
    ending(_name, _status, _place)(_interrupted(_kind, trained=_trained))


@pytest.fixture
def log(store: Store) -> Store:
    return Store(store.engine, before_commit=(views.catch_up,), clock=lambda _connection, local: local)


@pytest.mark.parametrize("part", ENDINGS)
def test_the_log_says_how_every_run_ended(log: Store, tmp_path: Path, part: str) -> None:
    """All stories of a part in one database: none disturbs another."""
    for name, (status, place, story_of) in ENDINGS[part].items():
        story = Story(log, tmp_path)
        expected = story_of(story)
        for number, (must, found) in enumerate(zip_longest(expected, story.entries()), 1):
            assert found == must, f"{name}, event {number}"
        run = find_run(log, story.run_id)
        assert (run.status, story.place()) == (status, place), name
        assert (run.ended_at is not None, run.daemon is None) == (status in ENDED, place != "driven"), name
        # What is left of it is none of the next story's.
        if place == "driven":
            story.end()
        elif run.status not in ENDED:
            lifecycle.cancel(log, story.clock.context, story.run_id, "test")


def test_what_is_recorded_of_a_journal_s_line(log: Store, tmp_path: Path) -> None:
    """Its time is the trainer's, and its id is known before it is recorded."""
    s = Story(log, tmp_path).submit().claim()
    attempts.record(
        log,
        s.clock.context,
        s.lease,
        [Line(number=n, occurred_at=500 + n, event=step(n)) for n in (1, 2)],
        20,
        {2: step(2, loss=7.5)},
    )
    with log.read() as connection:
        *_, first, second, anomaly = event_store.read_stream(connection, s.run_id)
    for number, r in ((1, first), (2, second)):
        assert (r.event_id, r.causation_id) == (journal.event_id(s.run_id, 1, number), None)
        assert (r.occurred_at, r.recorded_at) == (500 + number, s.clock.time)
        assert (r.type, r.attempt, r.actor) == ("StepCompleted", 1, "trainer")
    assert (anomaly.causation_id, anomaly.actor, anomaly.attempt) == (second.event_id, "test", 1)
    assert (anomaly.occurred_at, anomaly.recorded_at) == (502, s.clock.time)
    detail = {"loss": {"recorded": 7.5, "redone": 1.0}}
    assert anomaly.event == e.AnomalyDetected(step=2, what="redone step differs from the log", detail=detail)


def test_journals_of_two_attempts_are_taken_in_beside_each_other(log: Store, tmp_path: Path) -> None:
    """Each has its own lines from 1 on. They arrive torn, twice and in pieces."""
    s = Story(log, tmp_path).submit()
    for attempt, batches in ((1, [(1, 2), (1, 2), (1, 3)]), (2, [(1, 1), (1, 4), (3, 5)])):
        s.later(BACKOFF).claim()
        directory = AttemptDir(tmp_path / f"attempt-{attempt}")
        directory.path.mkdir()
        with open(directory.journal, "ab") as file:
            for first, last in batches:
                lines = [Line(number=n, occurred_at=n, event=step(n)) for n in range(first, last + 1)]
                attempts.record(log, s.clock.context, s.lease, lines, 10 * last, {})
            file.write(b'{"t":1,"type":"StepCompleted"')
        assert journal.read(directory.journal) == ([], 0), "a torn line is no line"
        s.end()
    with log.read() as connection:
        steps = [
            (r.attempt, r.event.step)
            for r in event_store.read_stream(connection, s.run_id)
            if isinstance(r.event, e.StepCompleted)
        ]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
