"""Find attempts whose daemon is gone, and end the processes of attempts that no daemon drives. An attempt is rescued only with
proof: a daemon or process that cannot be observed from here may be alive."""

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
    """`found`: leases of daemons that no longer run. `unobserved`: leases of daemons with this host name and home path in another
    boot or container, which may be alive."""

    found: list[Lease]
    unobserved: list[tuple[Lease, DaemonRow]]


def orphaned(store: Store, me: DaemonRow, driven: set[str], now: Micros, silent_micros: int) -> Orphans:
    """Leases of daemons of this host and home that no longer run. The daemon `me` holds the home's lock. Leases of daemons on
    other hosts are left alone, expired or not: those daemons cannot be observed from here."""
    with store.read() as connection:
        now = store.clock(connection, now)
        held = [lease for lease in leases.leases(connection) if lease.token not in driven]
        owners = {lease.owner: daemons.find(connection, lease.owner) for lease in held}
    orphans = Orphans([], [])
    for lease in held:
        if lease.owner == me.daemon_id:  # claimed, but an error prevented its supervision
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
    """The message for a lease whose daemon cannot be observed."""
    return SftdError(
        f"attempt {lease.attempt} was started by {owner.daemon_id} in another container, on another machine or before a reboot, "
        "and nothing here proves that its processes have ended: it is left alone. If they have ended, run "
        f"`sftd cancel {lease.run_id} --abandon`, then `sftd resume {lease.run_id}`"
    )


def _is_gone(me: DaemonRow, owner: DaemonRow, now: Micros, silent_micros: int) -> bool:
    """Whether a daemon of another boot or container has ended: it recorded its end, or `me` holds the lock of the very same
    home, or it is silent."""
    return (
        owner.stopped_at is not None
        or me.identity.has_home_of(owner.identity)
        or now - owner.seen_at > silent_micros
    )


def _has_ended(me: DaemonRow, owner: DaemonRow, lease: Lease) -> bool:
    """Whether provably no process of the attempt is alive. Its pids are of another boot or container, so they prove nothing."""
    directory = RunDir(me.home, lease.run_id).attempt(lease.attempt)
    rebooted = me.identity.rebooted_since(owner.identity)
    if not directory.path.exists():
        # Nothing was started in this home, but perhaps in another home with the same path.
        return rebooted or me.identity.has_home_of(owner.identity)
    if directory.lease() != lease.token:
        # The owner's home is another folder with the same path.
        return False
    if launcher_of(directory).is_managed:
        # The resource manager reports the job's state on every host.
        return True
    held = directory.is_held_alive()
    return rebooted if held is None else not held


def make_way(run: RunDir, number: int) -> list[int]:
    """Before attempt `number` of a run begins, end the processes of earlier attempts on this host, and set aside a folder
    with the new attempt's name. Returns the pids that were ended. Raises `OSError` if one does not die.

    Such processes exist if a user abandoned an attempt whose daemon was dead, or if the database was restored from a backup
    without the latest attempts.
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
