"""The queue of runs, and the lease on a run, which gives one daemon the right to drive it. Another daemon takes a lease over
only after proof that no daemon drives the attempt; expiry is not enough."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.store.database.engine import Tx
from sftd.store.database.tables import queue
from sftd.store.queue.lease_table import LeaseTable

WAITING, HELD, LEASED, IDLE = "waiting", "held", "leased", "idle"
_LEASES = LeaseTable(queue.c.run_id, queue.c.state == LEASED)
check, renew = _LEASES.check, _LEASES.renew


class Lease(msgspec.Struct, frozen=True):
    """The right of `owner` to drive an attempt until `expires_at`."""

    run_id: str
    attempt: int
    token: str
    owner: str
    expires_at: Micros


def enqueue(tx: Tx, run_id: str, priority: int, now: Micros) -> None:
    """Put a new run into the queue."""
    tx.execute(
        sa.insert(queue).values(
            run_id=run_id, state=WAITING, priority=priority, enqueued_at=now, not_before=now
        )
    )


def wait_again(tx: Tx, run_id: str, not_before: Micros, priority: int | None = None) -> None:
    """Put a run back into the queue at its old place, with a new `priority` if given. It does not start before `not_before`.
    Ends a lease on it."""
    moved = {} if priority is None else {"priority": priority}
    _set(tx, run_id, state=WAITING, not_before=not_before, token=None, owner=None, expires_at=None, **moved)


def leave(tx: Tx, run_id: str) -> None:
    """Take a run out of the queue. Ends a lease on it."""
    _set(tx, run_id, state=IDLE, token=None, owner=None, expires_at=None)


def _set(tx: Tx, run_id: str, **values: object) -> None:
    tx.execute(sa.update(queue).where(queue.c.run_id == run_id).values(**values))


def hold(tx: Tx, run_id: str) -> None:
    """Keep a waiting run from starting. It keeps its place."""
    tx.execute(sa.update(queue).where(queue.c.run_id == run_id, queue.c.state == WAITING).values(state=HELD))


def release(tx: Tx, run_id: str) -> None:
    """Let a held run start again when its turn comes."""
    tx.execute(sa.update(queue).where(queue.c.run_id == run_id, queue.c.state == HELD).values(state=WAITING))


def lease(tx: Tx, run_id: str, attempt: int, token: str, owner: str, expires_at: Micros) -> bool:
    """Lease a waiting run. Returns False when it no longer waits."""
    waits = queue.c.state == WAITING
    return _LEASES.take(tx, run_id, token, owner, expires_at, where=waits, state=LEASED, attempt=attempt)


def take_over(tx: Tx, old: Lease, token: str, owner: str, expires_at: Micros) -> bool:
    """Replace a lease of another daemon. Returns False when that lease has changed in the meantime."""
    unchanged = sa.and_(_LEASES.is_leased, queue.c.token == old.token)
    return _LEASES.take(tx, old.run_id, token, owner, expires_at, where=unchanged)


def expires_at(connection: sa.Connection, run_id: str) -> Micros | None:
    """When the lease on a run ends; None when there is none."""
    c = queue.c
    return connection.execute(sa.select(c.expires_at).where(c.run_id == run_id, c.state == LEASED)).scalar()


def leases(connection: sa.Connection) -> list[Lease]:
    """Every lease."""
    c = queue.c
    query = (
        sa.select(c.run_id, c.attempt, c.token, c.owner, c.expires_at)
        .where(c.state == LEASED)
        .order_by(c.run_id)
    )
    return [Lease(*row) for row in connection.execute(query)]
