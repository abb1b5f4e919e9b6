"""Events with their place in the log."""

from __future__ import annotations

import msgspec

from sftd.domain.log.events.base import Event, Micros


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its place in the log: one row of the events table."""

    position: int
    event_id: str
    run_id: str
    version: int
    type: str
    schema_version: int
    occurred_at: Micros
    recorded_at: Micros
    attempt: int | None
    actor: str
    causation_id: str | None
    event: Event


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event about to be appended to a run's stream."""

    event: Event
    event_id: str
    occurred_at: Micros
    actor: str
    attempt: int | None = None
    causation_id: str | None = None
