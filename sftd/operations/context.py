"""The actor, the clock and the randomness of an operation. The pure decisions get them as arguments."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from sftd.domain.log.events import Event, Micros, NewEvent, Recorded
from sftd.domain.run.state import Run
from sftd.store.database.engine import Tx
from sftd.store.log import event_store
from sftd.store.log.runs import load_run


def _now() -> Micros:
    return time.time_ns() // 1000


def _random(size: int) -> bytes:
    return os.urandom(size)


@dataclass(frozen=True)
class Context:
    """`actor` goes into every event. `now` and `random` are replaced in tests."""

    actor: str
    now: Callable[[], Micros] = field(default=_now)
    random: Callable[[int], bytes] = field(default=_random)

    def new_id(self) -> str:
        """A fresh uuid4."""
        return str(uuid.UUID(bytes=self.random(16), version=4))


def append_decided(
    tx: Tx, context: Context, run_id: str, version: int, decided: list[Event], attempt: int | None = None
) -> list[Recorded]:
    """Append the events that a decision on the run at `version` returned."""
    now = context.now()
    new = [
        NewEvent(
            event=event, event_id=context.new_id(), occurred_at=now, actor=context.actor, attempt=attempt
        )
        for event in decided
    ]
    return event_store.append(tx, run_id, version, new, now)


def current(connection: sa.Connection, run_id: str) -> Run:
    """The run's state, folded from the log inside a transaction."""
    return load_run(connection, run_id)
