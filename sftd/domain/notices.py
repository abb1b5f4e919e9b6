"""Notices for users: which events cause one, and its fields. The text is from `Event.notice`. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args

import msgspec

from sftd.domain.log import events as e
from sftd.domain.text.printable import printable

KINDS: tuple[e.NoticeKind, ...] = get_args(e.NoticeKind)


class Notice(msgspec.Struct, frozen=True):
    """A notice as sent. `id` is the event's id, so that a receiver can drop duplicates. `text` is the notice in one line."""

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
    """Names of the event types of these kinds."""
    return [name for name, cls in e.EVENT_TYPES.items() if cls.notice_kind in kinds]


def is_told(ordinal: int) -> bool:
    """Whether anomaly number `ordinal` of its kind in an attempt causes a notice: the 1st, 10th, 100th, …"""
    return str(ordinal).rstrip("0") == "1"


def notice(recorded: e.Recorded, run: e.NoticeFacts, ordinal: int = 1) -> Notice | None:
    """The notice of an event; None if the event causes none. `ordinal` counts anomalies of a kind in an attempt."""
    kind = recorded.event.notice_kind
    if kind is None or (said := recorded.event.notice(run)) is None:
        return None
    if ordinal > 1:
        said += f" ({ordinal} of this kind in this attempt)"
    who = f"{run.name} ({recorded.run_id})" if run.name else recorded.run_id
    return Notice(
        id=recorded.event_id,
        kind=kind,
        event=recorded.type,
        run_id=recorded.run_id,
        project=run.project,
        name=run.name,
        user=run.user,
        attempt=recorded.attempt,
        step=run.step,
        planned_steps=run.planned_steps,
        at=datetime.fromtimestamp(recorded.occurred_at / 1_000_000, UTC).isoformat(timespec="seconds"),
        # The text is passed in an environment variable, which cannot hold a NUL from a rank's output.
        text=printable(f"sftd: {who} {said}"),
    )


def trial(at: e.Micros, user: str) -> Notice:
    """A notice without an event, to test delivery."""
    when = datetime.fromtimestamp(at / 1_000_000, UTC).isoformat(timespec="seconds")
    text = f"sftd: this is a test, sent by {user}. Notifications arrive."
    return Notice(f"test-{at}", "test", "", "", "", "", user, None, 0, 0, when, text)
