"""Finds attempts whose daemon is gone: proven gone, and so are the attempt's processes, for what cannot be observed from here
may live. And ends processes here of attempts that nobody drives."""

from __future__ import annotations

import errno

import msgspec

from sftd.domain.errors import SftdError
from sftd.domain.log.events import Micros
from sftd.launcher import processes
from sftd.launcher.choosing import launcher_of
from sftd.store.database.engine import Store
from sftd.store.queue import daemons, leases
from sftd.store.queue.daemons import DaemonRow
from sftd.store.queue.leases import Lease
from sftd.wire.attempt.directory import RunDir


class Orphans(msgspec.Struct, frozen=True):
    """`found`: leases of daemons that no longer run. `unobserved`: leases of daemons with this host name and home path that ran
    in another boot or container, of which nothing is proven."""

    found: list[Lease]
    unobserved: list[tuple[Lease, DaemonRow]]


def orphaned(store: Store, me: DaemonRow, driven: set[str], now: Micros, silent_micros: int) -> Orphans:
    """Leases of daemons of this host and home that no longer run, as the daemon `me` sees it, which holds the home's lock. A
    daemon on another host cannot be observed from here: its leases are left alone, expired or not."""
    with store.read() as connection:
        now = store.clock(connection, now)
        held = [lease for lease in leases.leases(connection) if lease.token not in driven]
        owners = {lease.owner: daemons.find(connection, lease.owner) for lease in held}
    orphans = Orphans([], [])
    for lease in held:
        if lease.owner == me.daemon_id:  # claimed, but an error came before it was supervised
            orphans.found.append(lease)
            continue
        owner = owners[lease.owner]
        if owner is None or (owner.host, owner.home) != (me.host, me.home):
            continue
        if me.identity.is_same(owner.identity):
            if has_stopped(owner):
                orphans.found.append(lease)
        elif _is_gone(me, owner, now, silent_micros) and _has_ended(me, owner, lease):
            orphans.found.append(lease)
        else:
            orphans.unobserved.append((lease, owner))
    return orphans


def has_stopped(daemon: DaemonRow) -> bool:
    """Whether a daemon whose processes can be observed from here no longer runs."""
    return daemon.stopped_at is not None or not processes.is_alive(daemon.pid, daemon.create_time)


def not_observed(lease: Lease, owner: DaemonRow) -> SftdError:
    """What a person has to know of a lease whose daemon cannot be observed."""
    return SftdError(
        f"attempt {lease.attempt} was started by {owner.daemon_id} in another container, on another machine or before a reboot, "
        "and nothing here proves that its processes have ended: it is left alone. If they have, "
        f"`sftd cancel {lease.run_id} --abandon`, then `sftd resume {lease.run_id}`"
    )


def _is_gone(me: DaemonRow, owner: DaemonRow, now: Micros, silent_micros: int) -> bool:
    """Whether a daemon of another boot or container has ended: it said so, or this daemon holds the lock of the very same home,
    or it is silent."""
    return (
        owner.stopped_at is not None
        or me.identity.has_home_of(owner.identity)
        or now - owner.seen_at > silent_micros
    )


def _has_ended(me: DaemonRow, owner: DaemonRow, lease: Lease) -> bool:
    """Whether it is proven that no process of the attempt lives, although its pids mean nothing here."""
    directory = RunDir(me.home, lease.run_id).attempt(lease.attempt)
    rebooted = me.identity.rebooted_since(owner.identity)
    if not directory.path.exists():
        # Nothing was started in this home; in another one it may have been.
        return rebooted or me.identity.has_home_of(owner.identity)
    if directory.lease() != lease.token:
        # The folder of another home, which has this path there.
        return False
    if launcher_of(directory).is_managed:
        # Its resource manager reports on it to every host.
        return True
    held = directory.is_held_alive()
    return rebooted if held is None else not held


def make_way(run: RunDir, number: int) -> list[int]:
    """Before attempt `number` of a run begins: end the processes here of those before it, and set aside a folder
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
