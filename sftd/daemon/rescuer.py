"""Finds attempts whose daemon is gone. Gone means proven: the process does not exist any more on this very host."""

from __future__ import annotations

from sftd.launcher import processes
from sftd.store import daemons, queue
from sftd.store.engine import Store
from sftd.store.queue import Lease


def orphaned(store: Store, host: str, home: str, me: str, driven: set[str]) -> list[Lease]:
    """Leases of daemons of this host and home that no longer run. A daemon on another host cannot be observed from here, and
    "cannot observe" is not "dead": its leases are left alone, expired or not."""
    with store.read() as connection:
        held = [lease for lease in queue.leases(connection) if lease.token not in driven]
        owners = {lease.owner: daemons.find(connection, lease.owner) for lease in held}
    found = []
    for lease in held:
        if lease.owner == me:  # claimed, but an error came before it was supervised
            found.append(lease)
            continue
        owner = owners[lease.owner]
        if owner is None or (owner.host, owner.home) != (host, home):
            continue
        if owner.stopped_at is not None or not processes.is_alive(owner.pid, owner.create_time):
            found.append(lease)
    return found
