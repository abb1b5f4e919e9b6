"""Finds attempts whose daemon is gone. Gone means proven: the process does not exist any more on this very host. And ends what
lives on here of attempts that nobody drives."""

from __future__ import annotations

import errno

from sftd.launcher import processes
from sftd.store import daemons, queue
from sftd.store.engine import Store
from sftd.store.queue import Lease
from sftd.wire.attempt_dir import RunDir


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


def make_way(run: RunDir, number: int) -> list[int]:
    """Before attempt `number` of a run begins: end the processes of those before it that live on here, and set aside a folder
    that has its name already. Returns the pids that were ended. Raises `OSError` when one will not die.

    A person may have given an attempt up whose daemon was dead, so nobody has ended it; and a database that was restored from a
    backup does not know of the attempts since then.
    """
    tokens = set()
    for earlier in range(1, number + 1):
        try:
            tokens.add(run.attempt(earlier).order().token)
        except (OSError, ValueError):
            # It was never started, or on another host.
            continue
    pids = processes.survivors(*tokens) if tokens else []
    if stuck := processes.kill(pids) if pids else []:
        raise OSError(errno.EBUSY, f"processes {stuck} of an earlier attempt will not die")
    run.attempt(number).set_aside()
    return pids
