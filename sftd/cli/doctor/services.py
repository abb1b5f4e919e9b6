"""The checks of `sftd doctor` besides the host: the database, daemons, and remains of dead attempts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sftd.cli.terminal import output
from sftd.domain.finding import Finding, broken, ok, warning
from sftd.domain.text.words import counted
from sftd.settings import Settings, sqlite_file

if TYPE_CHECKING:
    from sftd.store.database.engine import Store

_SKEW_SECONDS = 2.0


def database(settings: Settings) -> tuple[Store | None, list[Finding]]:
    """The store if it is usable, and the findings. Creates and changes nothing."""
    from sftd.store.database.engine import Store, open_engine, shown_url
    from sftd.store.database.tables import SCHEMA_REVISION

    url = shown_url(settings.database_url)
    file = sqlite_file(settings.database_url)
    if file is not None and not file.exists():
        return None, [ok("database", f"{url}: the first command that needs it creates it")]
    store = Store(open_engine(settings.database_url))
    revision = store.schema_revision()
    if revision != SCHEMA_REVISION:
        store.engine.dispose()
        if file is not None and (revision is None or revision < SCHEMA_REVISION):
            return None, [ok("database", f"{url}: the next command that needs it upgrades it")]
        what = f"tables of revision {revision}" if revision else "no tables"
        fix = "run `sftd init`" if revision is None or revision < SCHEMA_REVISION else "use the newer sftd"
        return None, [
            broken("database", f"{url} has {what}; this sftd needs revision {SCHEMA_REVISION}", fix)
        ]
    return store, [_skew(store, f"{url}, revision {revision}")]


def _skew(store: Store, text: str) -> Finding:
    import sqlalchemy as sa

    if store.engine.dialect.name != "postgresql":
        return ok("database", text)
    with store.engine.connect() as connection:
        before = time.time()
        theirs = float(
            connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        )
        after = time.time()
    skew = theirs - (before + after) / 2
    text += f", answers in {(after - before) * 1000:.1f} ms"
    if abs(skew) > _SKEW_SECONDS:
        fix = "synchronise both clocks (NTP): the queue uses the server's clock, events have this host's time"
        return warning("database", f"{text}; its clock is {skew:+.1f} s off this host's", fix)
    return ok("database", f"{text}, clocks {abs(skew) * 1000:.0f} ms apart")


def daemon(settings: Settings, store: Store | None) -> Iterator[Finding]:
    """Whether a daemon drives this home, and whether other daemons of this database are silent."""
    from sftd.daemon import lock

    holder = lock.holder(settings.daemon_lock)
    if holder is None:
        start = "`sftd daemon --detach`, or a systemd unit (`sftd daemon --print-systemd`)"
        yield warning(
            "daemon", "none runs in this home: queued runs wait, and attempts are not watched", start
        )
    else:
        yield ok("daemon", f"runs, pid {holder}, log {settings.logs / 'daemon.log'} when detached")
    if store is None:
        return
    from sftd.daemon.registration import this_daemon, twins
    from sftd.store.queue import daemons
    from sftd.store.queue import leases as lease_store

    me, now = this_daemon(settings, {}), time.time_ns() // 1000
    for twin in twins(store, me, now, settings.silent_micros):
        what = f"{twin.daemon_id} has this host's name and the path of this home, and runs in another container or on another machine"
        fix = "give each its own host name (`docker run --hostname NAME`), or another path for SFTD_HOME"
        yield broken("daemon", what, fix)
    with store.read() as connection:
        now = store.clock(connection, now)
        leases = lease_store.leases(connection)
        owners = {lease.owner: daemons.find(connection, lease.owner) for lease in leases}
    for lease in leases:
        owner = owners[lease.owner]
        if owner is None or (silent := now - owner.seen_at) <= settings.silent_micros:
            continue
        what = f"{lease.run_id} is driven by {lease.owner}, silent for {output.duration(silent / 1e6)}"
        if owner.host != me.host:
            fix = f"start its daemon again on {owner.host}; if that host is gone, `sftd cancel {lease.run_id} --abandon`"
            yield warning("daemon", what, fix)
        elif not me.identity.is_same(owner.identity):
            what += ", which ran in another container, on another machine or before a reboot"
            fix = "a daemon here takes it over if it can prove that the processes have ended, else it logs why not; "
            yield warning("daemon", what, fix + f"then, if they have, `sftd cancel {lease.run_id} --abandon`")
        elif holder is None:
            yield warning("daemon", what, "start a daemon: it takes the run over")


def daemon_devices(settings: Settings, store: Store | None) -> Mapping[str, int] | None:
    """The devices and places of the daemon that runs in this home; None if none runs or the database is not usable."""
    import msgspec

    from sftd.daemon import lock
    from sftd.launcher import processes
    from sftd.store.queue import daemons

    holder = lock.holder(settings.daemon_lock)
    if holder is None or store is None:
        return None
    me = (processes.host_name(), holder)
    with store.read() as connection:
        rows = daemons.every(connection)
    mine = [row.devices for row in rows if (row.host, row.pid) == me and row.stopped_at is None]
    return msgspec.json.decode(mine[0], type=dict[str, int]) if mine else None


def leftovers(settings: Settings, store: Store | None) -> Iterator[Finding]:
    """Processes and half-written checkpoints of attempts that no daemon drives, and scratch folders of killed commands."""
    from sftd.launcher import processes, rerun
    from sftd.store.queue import leases as lease_store

    runs_dir = settings.home / "runs"
    killed = rerun.abandoned(settings.home)
    if killed:
        trains = len(processes.of_attempts(rerun.scratch_folder(settings.home)))
        what = f"{counted(len(killed), 'scratch folder')} of `sftd verify` that was killed"
        what += f", with {counted(trains, 'training process', 'training processes')}" if trains else ""
        yield warning("leftovers", what, "a daemon ends and removes them: `sftd daemon --detach`")
    if store is None:
        return
    with store.read() as connection:
        driven = {lease.run_id: lease.attempt for lease in lease_store.leases(connection)}
    stray: dict[str, list[int]] = {}
    for pid, place in processes.of_attempts(runs_dir).items():
        run_id, attempt = (*place.parts, "", "")[:2]
        if attempt != f"attempt-{driven.get(run_id, 0):04d}":
            stray.setdefault(run_id, []).append(pid)
    for run_id, pids in stray.items():
        kill = f"kill -9 {' '.join(map(str, pids))}"
        what = f"{counted(len(pids), 'process', 'processes')} of {run_id}, whose attempt is over"
        yield warning("leftovers", f"{what} (pids {', '.join(map(str, pids))})", kill)
    partial = [p for p in runs_dir.glob("*/checkpoints/*.partial") if p.parts[-3] not in driven]
    if partial:
        size = sum(f.stat().st_size for folder in partial for f in folder.rglob("*") if f.is_file())
        what = f"{counted(len(partial), 'half-written checkpoint')} of runs that no daemon drives, {output.size(size)}"
        fix = shlex.join(["rm", "-r", *map(str, partial[:3])]) + (" …" if len(partial) > 3 else "")
        yield warning("leftovers", what, fix)
    if not stray and not partial and not killed:
        yield ok("leftovers", "none of dead attempts")
