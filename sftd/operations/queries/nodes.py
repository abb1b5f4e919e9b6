"""The daemons that share the database, with their devices and runs. Nothing here writes."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from sftd.domain.log.events import AttemptLaunched, Micros
from sftd.domain.queue.demand import HOST_DEVICES
from sftd.operations.context import Context
from sftd.operations.queries.queue import host_of
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.queue import daemons
from sftd.store.queue import leases as lease_store
from sftd.store.queue.daemons import DaemonRow

# An unobserved daemon need not be dead: its host may have lost the database while its runs train.
NodeState = Literal["alive", "not observed", "stopped"]


class Devices(msgspec.Struct, frozen=True):
    """Number of devices of one kind, or of places of one launcher."""

    total: int
    used: int

    @property
    def free(self) -> int:
        """Devices that no run holds."""
        return max(0, self.total - self.used)


class Node(msgspec.Struct, frozen=True):
    """A daemon with its host's devices and the runs whose leases it holds. Times are µs by the database's clock."""

    host: str
    daemon: str
    state: NodeState
    pid: int
    home: str
    devices: dict[str, Devices]
    runs: list[str]
    started_at: Micros
    seen_at: Micros
    unseen_seconds: float


def list_nodes(store: Store, context: Context, silent_micros: int, *, everyone: bool = False) -> list[Node]:
    """The last daemon of each home on each host, and older ones that still hold leases. `everyone` lists all daemons that ever
    started. A daemon that was not seen for `silent_micros` is "not observed"."""
    with store.read() as connection:
        now = store.clock(connection, context.now())
        rows = daemons.every(connection)
        leases = lease_store.leases(connection)
        attempts = {(lease.run_id, lease.attempt) for lease in leases}
        launched = event_store.read_types(
            connection, [lease.run_id for lease in leases], (AttemptLaunched.__name__,)
        )
        held = {
            r.run_id: r.event.devices
            for r in launched
            if isinstance(r.event, AttemptLaunched) and (r.run_id, r.attempt) in attempts
        }
    driven: dict[str, list[str]] = {}
    for lease in leases:
        driven.setdefault(lease.owner, []).append(lease.run_id)
    found, homes = [], set()
    for row in rows:
        is_last = (row.host, row.home) not in homes
        homes.add((row.host, row.home))
        if everyone or is_last or row.daemon_id in driven:
            runs = driven.get(row.daemon_id, [])
            devices = [device for run_id in runs for device in held.get(run_id, [])]
            found.append(_node(row, runs, devices, now, silent_micros))
    return sorted(found, key=lambda node: (node.host, node.home, -node.started_at))


def _node(row: DaemonRow, runs: list[str], held: list[str], now: Micros, silent_micros: int) -> Node:
    silent = now - row.seen_at > silent_micros
    used = Counter(device.partition(":")[0] for device in held)
    host = host_of(row)
    counts = {"gpus": host.gpus, "cpus": host.cpus, **host.places}
    return Node(
        host=row.host,
        daemon=row.daemon_id,
        state="stopped" if row.stopped_at is not None else "not observed" if silent else "alive",
        pid=row.pid,
        home=row.home,
        devices={kind: Devices(n, used[HOST_DEVICES.get(kind, kind)]) for kind, n in counts.items()},
        runs=runs,
        started_at=row.started_at,
        seen_at=row.seen_at,
        unseen_seconds=max(0, now - row.seen_at) / 1e6,
    )
