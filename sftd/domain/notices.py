"""What people are told of without asking: which events, and in which words. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from sftd.domain.log import events as e
from sftd.domain.text.printable import printable
from sftd.domain.text.words import counted

# Kind → the events that it is about.
EVENTS: dict[str, tuple[type[e.Event], ...]] = {
    "ended": (e.RunSucceeded, e.RunCancelled),
    "failed": (e.RunFailed,),
    "anomaly": (e.AnomalyDetected, e.ReplayDiverged, e.CheckpointRejected),
    "started": (e.AttemptLaunched,),
    "retrying": (e.AttemptFailed, e.AttemptLost),
    "paused": (e.AttemptPaused, e.AttemptPreempted),
}
KINDS = tuple(EVENTS)


class Facts(NamedTuple):
    """What is known of a run besides the event."""

    project: str
    name: str
    user: str
    step: int
    planned_steps: int
    loss: str | None


class Notice(msgspec.Struct, frozen=True):
    """What is sent. `id` is the event's: whoever gets a notice twice knows it by that. `text` says it all in a line."""

    id: str
    kind: str
    event: str
    run_id: str
    project: str
    name: str
    user: str
    attempt: int | None
    step: int
    planned_steps: int
    at: str
    text: str


def event_types(kinds: tuple[str, ...]) -> list[str]:
    """Names of the event types of some kinds."""
    return [cls.__name__ for kind in kinds for cls in EVENTS[kind]]


def is_told(ordinal: int) -> bool:
    """Whether the anomaly that is number `ordinal` of its kind in an attempt is told: the 1st, 10th, 100th, …"""
    return str(ordinal).rstrip("0") == "1"


def notice(recorded: e.Recorded, facts: Facts, ordinal: int = 1) -> Notice | None:
    """The notice of an event; None when nothing is to be said. `ordinal` counts anomalies of a kind in an attempt."""
    event = recorded.event
    kind = next((name for name, types in EVENTS.items() if isinstance(event, types)), None)
    if kind is None:
        return None
    said = _said(event, facts)
    if said is None:
        return None
    if ordinal > 1:
        said += f" ({ordinal} of this kind in this attempt)"
    who = f"{facts.name} ({recorded.run_id})" if facts.name else recorded.run_id
    return Notice(
        id=recorded.event_id,
        kind=kind,
        event=recorded.type,
        run_id=recorded.run_id,
        project=facts.project,
        name=facts.name,
        user=facts.user,
        attempt=recorded.attempt,
        step=facts.step,
        planned_steps=facts.planned_steps,
        at=datetime.fromtimestamp(recorded.occurred_at / 1_000_000, UTC).isoformat(timespec="seconds"),
        # No environment variable holds the NUL of a dying rank's last words.
        text=printable(f"sftd: {who} {said}"),
    )


def _said(event: e.Event, facts: Facts) -> str | None:
    where = f"at step {facts.step:,} of {facts.planned_steps:,}"
    match event:
        case e.RunSucceeded():
            loss = f", loss {float(facts.loss):.4g}" if facts.loss is not None else ""
            return f"succeeded: {counted(event.steps, 'step')}, {counted(event.tokens, 'token')}{loss}"
        case e.RunCancelled():
            return f"was cancelled by {event.by} {where}"
        case e.RunFailed():
            return f"failed {where}: {event.cause}: {_line(event.message)}"
        case e.AnomalyDetected():
            return f"anomaly at step {event.step:,}: {event.what}"
        case e.ReplayDiverged():
            return f"anomaly: step {event.step:,}, trained again by {event.by}, differs from the log"
        case e.CheckpointRejected():
            return f"anomaly: the checkpoint of step {event.step:,} was rejected: {_line(event.reason)}"
        case e.AttemptLaunched():
            return f"started on {event.host}"
        case e.AttemptFailed() if event.retry_at is not None:
            return f"failed {where}, and will be tried again: {event.cause}: {_line(event.message)}"
        case e.AttemptLost() if event.retry_at is not None:
            return f"was lost {where}, and will be tried again: {_line(event.message)}"
        case e.AttemptPaused():
            return f"was paused by {event.by} at step {event.step:,}"
        case e.AttemptPreempted() if not event.by_run:
            return f"was interrupted at step {event.step:,}, and is queued again: {_line(event.reason)}"
        case e.AttemptPreempted():
            return f"made room for {event.by_run} at step {event.step:,}"
    return None  # an attempt that failed for good: the run's failure is told


def _line(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= 300 else first[:300] + "…"


def trial(at: e.Micros, user: str) -> Notice:
    """A notice that tells of nothing, to try whether notices arrive."""
    when = datetime.fromtimestamp(at / 1_000_000, UTC).isoformat(timespec="seconds")
    text = f"sftd: this is a test, sent by {user}. Notifications arrive."
    return Notice(f"test-{at}", "test", "", "", "", "", user, None, 0, 0, when, text)
