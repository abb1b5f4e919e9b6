"""Which run starts next on a daemon's host, and which runs it preempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import sqlalchemy as sa

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import Demand, Need
from sftd.domain.queue.forecast import look_ahead
from sftd.domain.queue.order import Entry, Gate, Limits, choose_victims, stuck
from sftd.domain.run import stops
from sftd.operations.context import Context, append_decided, current
from sftd.operations.queries.placing import placed
from sftd.operations.queries.queue import host_of, living
from sftd.store.database.engine import Store
from sftd.store.queue import daemons, leases, order

NO_LIMITS = Limits()
# Whether a run's devices are free (True) or in use (False). None: it can never start here, because it needs more devices than
# this host has, or because its checkpoint is on another host.
Fits = Callable[[Entry], bool | None]


class Turn(msgspec.Struct, frozen=True):
    """The run whose turn it is, and whether its devices are free. If not, it and all later runs wait."""

    entry: Entry
    fits: bool


def next_turn(connection: sa.Connection, now: Micros, fits: Fits, limits: Limits) -> Turn | None:
    """The first run in order that can start here as soon as its devices are free. Runs of one launcher do not wait for runs of
    another."""
    gate = Gate(limits, order.running(connection) if limits != NO_LIMITS else (), now)
    waits: Turn | None = None
    for entry in order.in_order(connection, now):
        if waits is not None and entry.demand.launcher == waits.entry.demand.launcher:
            continue
        if gate.why_not(entry) is None and (fit := fits(entry)) is not None:
            if fit:
                return Turn(entry, fit)
            if waits is not None:
                # Both wait: preemption is for the first.
                return waits
            waits = Turn(entry, fit)
    return waits


def preempt(
    store: Store,
    context: Context,
    *,
    daemon: str,
    fits: Fits,
    need: Callable[[Demand], Need],
    free: Callable[[str], int],
    limits: Limits,
    silent_micros: int,
) -> list[str]:
    """Preempt runs of lower priority for the run whose turn it is, if they free enough devices. Returns their ids.

    `need` returns the devices that a run needs on this host, `free` the number of free devices of a kind. No run is
    preempted while another daemon, seen in the last `silent_micros`, has free devices: that daemon is about to start the run.
    """

    def plan(connection: sa.Connection) -> tuple[Entry, list[Entry]] | None:
        mine = order.running(connection, daemon)
        if not any(e.demand.preemptible for e in mine):
            return None
        now = store.clock(connection, context.now())
        turn = next_turn(connection, now, fits, limits)
        if turn is None or turn.fits:
            return None
        wanted = need(turn.entry.demand)

        def count(entry: Entry) -> int:
            has = need(entry.demand)
            return has.count if has.device == wanted.device else 0

        going = [e for e in mine if e.status == "stopping"]
        staying = [e for e in mine if e.status != "stopping"]
        lacking = wanted.count - free(wanted.device) - sum(map(count, going))
        victims = choose_victims(turn.entry, staying, lacking, count)
        if not victims or _others_make_room(connection, turn.entry, daemon, now):
            return None
        if _others_have_room(connection, turn.entry, daemon, now, silent_micros):
            return None
        return turn.entry, victims

    with store.read() as connection:
        if plan(connection) is None:
            return []
    with store.write() as tx:
        # Plan again: in this transaction no other process can change the queue.
        found = plan(tx.connection)
        if found is None:
            return []
        head, victims = found
        for victim in victims:
            run = current(tx.connection, victim.run_id)
            decided = stops.preempt(run, head.run_id, head.priority)
            append_decided(tx, context, run.run_id, run.version, decided, run.attempt)
        return [victim.run_id for victim in victims]


def _others_make_room(connection: sa.Connection, head: Entry, daemon: str, now: Micros) -> bool:
    """Whether another daemon already preempts runs for `head`. Expired leases do not count: a silent daemon may never stop
    its runs."""
    return any(
        current(connection, e.run_id).preempted_by == head.run_id
        and (leases.expires_at(connection, e.run_id) or 0) > now
        for e in order.running(connection)
        if e.owner != daemon and e.status == "stopping"
    )


def _others_have_room(
    connection: sa.Connection, head: Entry, daemon: str, now: Micros, silent_micros: int
) -> bool:
    """Whether the host of another living daemon has devices free for `head`."""
    alive = living(daemons.every(connection), now, silent_micros)
    hosts = [host_of(row) for row in alive if row.daemon_id != daemon]
    # Free devices count only on a host that has its checkpoint.
    head = placed(connection, [head])[0]
    return (
        look_ahead([head], order.running(connection), hosts, NO_LIMITS, now)[head.run_id].wait.kind == "start"
    )


def stopping(store: Store, daemon: str) -> Mapping[str, bool]:
    """The runs of this daemon that have a stop request, and whether to kill them."""
    with store.read() as connection:
        return {run_id: current(connection, run_id).stop_now for run_id in order.stopping(connection, daemon)}


def anything_left(store: Store, context: Context, fits: Fits, limits: Limits) -> bool:
    """Whether a daemon drives a run, or a waiting run can start here without a user's action."""
    with store.read() as connection:
        now = store.clock(connection, context.now())
        if any(lease.expires_at > now for lease in leases.leases(connection)):
            return True
        waiting = [e for e in order.waiting(connection) if not e.is_held]
    gate = Gate(limits, (), now)
    return len(stuck(waiting, lambda e: gate.can_ever_pass(e) and fits(e) is not None)) < len(waiting)
