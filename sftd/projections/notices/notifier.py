"""Send notices from the log: each at least once, in order, from one daemon at a time.

The database has a position for each combination of channel and kinds: the last event whose notice has arrived. A daemon
that sends other kinds to the same channel has its own position. It begins at the end of the log when the channel is first
used for these kinds. The sending daemon holds the channel's lease, and moves the position after each notice in a
transaction that checks the lease. So a notice is sent twice only if the sender dies between the answer and the commit, or is
so slow that its lease expires.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from sftd.domain import notices
from sftd.domain.errors import LeaseLost
from sftd.domain.log import events as e
from sftd.domain.notices import Notice
from sftd.projections.notices.channels import Channel, NotSent
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log import event_store, positions
from sftd.store.queue import named_leases

log = logging.getLogger("sftd.notify")

# Longer than any channel takes to send one notice.
_LEASE_MICROS = 60_000_000
# Older notices are not sent: after a webhook is fixed, or after an import, they would be a flood of stale news.
OLDEST_MICROS = 3 * 24 * 3600 * 1_000_000
# The position is written after this number of events without a notice.
_UNWRITTEN = 10_000
PAGE = 100
_COUNTED = 1000


@dataclass
class _Counted:
    """Anomalies of one run by (attempt, type, what), up to a version."""

    version: int
    counts: dict[tuple[int | None, str, str], int]


class Notifier:
    """Sends notices of some kinds of events to one channel. Not thread-safe."""

    def __init__(
        self, store: Store, channel: Channel, kinds: tuple[str, ...], now: Callable[[], e.Micros]
    ) -> None:
        self.channel = channel
        self._store = store
        self._types = notices.event_types(kinds)
        # One letter per kind, because the column is short.
        self._name = f"{channel.identity}:{''.join(sorted({kind[0] for kind in kinds}))}"
        self._now = now
        self._token = str(uuid.uuid4())
        # Half-time of the lease, by this host's monotonic clock.
        self._renew_at = 0.0
        self._seen = 0
        self._counted: dict[str, _Counted] = {}

    def begin(self) -> None:
        """Start at the end of the log. Does nothing if the channel already has a position."""
        with self._store.write(appends=False) as tx:
            positions.begin_projection(tx.connection, self._name, event_store.last_position(tx.connection))

    def pending_count(self) -> int | None:
        """The number of events that are still to be sent, at most `PAGE`; None if no daemon has used the channel yet."""
        with self._store.read() as connection:
            begun = positions.has_begun(connection, self._name)
        return len(self._pending()) if begun else None

    def _pending(self) -> list[e.Recorded]:
        """The next events to send, in order, from the stored position."""
        with self._store.read() as connection:
            position = positions.projection_position(connection, self._name)
            return event_store.read_types_after(connection, position, self._types, PAGE)

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Send new notices. Returns the number that arrived. Raises `NotSent` when one did not; the next call tries it again."""
        if not self._anything_new():
            return 0
        if not self._lease():
            return 0  # another daemon sends
        sent = 0
        try:
            # Read the position again under the lease: another daemon may have sent in the meantime.
            while (page := self._pending()) and not should_stop():
                for recorded in page:
                    if should_stop():
                        break
                    if time.monotonic() > self._renew_at and not self._renew():
                        return sent
                    arrived = self._send(recorded)
                    sent += arrived
                    # Many consecutive anomalies have no notice: move the position once for all of them.
                    if (arrived or recorded is page[-1]) and not self._move(recorded.position):
                        return sent
        finally:
            self._release()
        return sent

    def _anything_new(self) -> bool:
        with self._store.read() as connection:
            written = positions.projection_position(connection, self._name)
            end = event_store.last_position(connection)
            since = max(written, self._seen)
            found = event_store.read_types_after(connection, since, self._types, 1) if end > since else []
        if found:
            self._seen = min(self._seen, found[0].position - 1)
            return True
        self._seen = end
        if end - written > _UNWRITTEN and self._lease():
            self._move(end)
            self._release()
        return False

    def _send(self, recorded: e.Recorded) -> bool:
        """Send an event's notice. Returns False if the event has none, or the notice is too old or rejected for good."""
        made = self._notice(recorded)
        if made is None:
            return False
        if self._now() - recorded.occurred_at > OLDEST_MICROS:
            log.warning("%s: too old to be sent: %s", self.channel.shown, made.text)
            return False
        try:
            self.channel.send(made)
        except NotSent as error:
            if not error.is_final:
                raise
            log.error("%s: %s; not sent: %s", self.channel.shown, error, made.text)
            return False
        return True

    def _notice(self, recorded: e.Recorded) -> Notice | None:
        ordinal = 1
        if isinstance(recorded.event, e.AnomalyDetected):
            ordinal = self._ordinal(recorded, recorded.event)
            if not notices.is_told(ordinal):
                return None
        c = view_runs.c
        query = sa.select(c.project, c.name, c.user, c.step, c.planned_steps, c.loss)
        with self._store.read() as connection:
            row = connection.execute(query.where(c.run_id == recorded.run_id)).first()
        facts = e.NoticeFacts(*row) if row is not None else e.NoticeFacts("", "", "", 0, 0, None)
        return notices.notice(recorded, facts, ordinal)

    def _ordinal(self, recorded: e.Recorded, event: e.AnomalyDetected) -> int:
        """The number of an anomaly among those of its kind in its attempt, from 1. Counted in the log, so that it survives a
        restart."""
        if len(self._counted) > _COUNTED:
            self._counted.clear()
        known = self._counted.get(recorded.run_id)
        if known is None or known.version > recorded.version:
            known = self._counted[recorded.run_id] = _Counted(0, {})
        with self._store.read() as connection:
            for other in event_store.read_stream(
                connection, recorded.run_id, known.version, (recorded.type,)
            ):
                if other.version > recorded.version:
                    break
                if isinstance(other.event, e.AnomalyDetected):
                    key = (other.attempt, other.type, other.event.what)
                    known.counts[key] = known.counts.get(key, 0) + 1
        known.version = recorded.version
        return known.counts[recorded.attempt, recorded.type, event.what]

    def _lease(self) -> bool:
        """Take the lease. Returns False if another daemon has it."""
        owner = f"{socket.gethostname()[:40]}-{os.getpid()}"
        self._renew_at = time.monotonic() + _LEASE_MICROS / 2_000_000
        with self._store.write(appends=False) as tx:
            return named_leases.take(tx, self._name, self._token, owner, self._now(), _LEASE_MICROS)

    def _renew(self) -> bool:
        self._renew_at = time.monotonic() + _LEASE_MICROS / 2_000_000
        with self._store.write(appends=False) as tx:
            return named_leases.renew(tx, self._token, self._now(), _LEASE_MICROS)

    def _release(self) -> None:
        with self._store.write(appends=False) as tx:
            named_leases.release(tx, self._name, self._token)

    def _move(self, position: int) -> bool:
        """Move the position if this daemon still holds the lease. Returns False if it does not."""
        with self._store.write(appends=False) as tx:
            try:
                named_leases.check(tx, self._name, self._token)
            except LeaseLost:
                return False
            positions.set_projection_position(tx.connection, self._name, position)
        self._seen = max(self._seen, position)
        return True
