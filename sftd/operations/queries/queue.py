"""The queue that users see: running and waiting runs, what each waits for, and when it starts. Nothing here writes."""

from __future__ import annotations

from functools import reduce

import msgspec

from sftd.domain.log.events import JobReported, Micros
from sftd.domain.queue.demand import need
from sftd.domain.queue.forecast import HostCapacity, Outlook, look_ahead
from sftd.domain.queue.order import Entry, Limits
from sftd.domain.spec.launch.launchers import LOCAL, kind_of
from sftd.operations.context import Context, current
from sftd.operations.queries.placing import placed
from sftd.store.database.engine import Store
from sftd.store.queue import daemons, order
from sftd.store.queue.daemons import DaemonRow


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `sftd queue`. `devices` is the number that the run has or needs. `kind` is the reason why a run waits, and
    `waits_for` describes it; both are empty for a run that a daemon drives. `observed` is false if that daemon was not seen
    lately. `job` is the last report of the resource manager of `launcher`. Times are µs since the epoch; `starts_at` None is
    unknown."""

    run_id: str
    status: str
    priority: int
    devices: int
    user: str
    project: str
    step: int
    planned_steps: int
    seconds_left: float | None
    host: str | None = None
    launcher: str = LOCAL.name
    observed: bool = True
    job: JobReported | None = None
    kind: str = ""
    waits_for: str = ""
    not_before: Micros | None = None
    starts_at: Micros | None = None


def list_queue(store: Store, context: Context, limits: Limits, silent_micros: int) -> list[QueueRow]:
    """The runs that daemons drive, then the waiting runs in the order in which they start. A daemon that was not seen for
    `silent_micros` counts as dead. `limits` apply if no living daemon has recorded its own."""
    with store.read() as connection:
        now = store.clock(connection, context.now())
        running = order.running(connection)
        waiting = placed(connection, order.waiting(connection))
        rows = daemons.every(connection)
        managed = [r.run_id for r in running if kind_of(r.demand.launcher).is_managed]
        jobs = {run_id: current(connection, run_id).job_report for run_id in managed}
    hosts = {row.daemon_id: host_of(row) for row in rows}
    alive = [hosts[row.daemon_id] for row in living(rows, now, silent_micros)]
    if recorded := [host.limits for host in alive if host.limits is not None]:
        limits = reduce(Limits.loosened, recorded)
    outlooks = look_ahead(waiting, running, alive, limits, now)
    driven = [
        _driven(entry, hosts.get(entry.owner or ""), alive, jobs.get(entry.run_id)) for entry in running
    ]
    return driven + [_waiting(entry, outlooks[entry.run_id], alive) for entry in waiting]


def living_hosts(store: Store, context: Context, silent_micros: int) -> list[HostCapacity]:
    """The hosts of all daemons that were seen within `silent_micros`."""
    with store.read() as connection:
        now = store.clock(connection, context.now())
        return [host_of(row) for row in living(daemons.every(connection), now, silent_micros)]


def living(rows: list[DaemonRow], now: Micros, silent_micros: int) -> list[DaemonRow]:
    """Daemons that have not stopped and were seen within `silent_micros`."""
    return [row for row in rows if row.stopped_at is None and row.seen_at > now - silent_micros]


def host_of(row: DaemonRow) -> HostCapacity:
    """A daemon's host, with its devices."""
    return HostCapacity.of(row.daemon_id, row.host, msgspec.json.decode(row.devices, type=dict[str, int]))


def _devices(entry: Entry, hosts: list[HostCapacity]) -> int:
    """The number of devices that the run takes on the first of these hosts that is large enough."""
    if not kind_of(entry.demand.launcher).uses_host_devices:
        return entry.demand.world
    for host in hosts:
        wanted = need(entry.demand, host.gpus, host.cpus)
        if wanted.count <= host.total(wanted.device):
            return wanted.count
    return entry.demand.world


def _driven(
    entry: Entry, host: HostCapacity | None, alive: list[HostCapacity], job: JobReported | None
) -> QueueRow:
    return QueueRow(
        run_id=entry.run_id,
        status=entry.status,
        priority=entry.priority,
        devices=_devices(entry, [host] if host else []),
        user=entry.user,
        project=entry.project,
        step=entry.step,
        planned_steps=entry.planned_steps,
        # A stopping run does not train the remaining steps.
        seconds_left=None if entry.status == "stopping" else entry.seconds_left,
        host=host.name if host else None,
        observed=host in alive,
        launcher=entry.demand.launcher,
        job=job,
    )


def _waiting(entry: Entry, outlook: Outlook, alive: list[HostCapacity]) -> QueueRow:
    return QueueRow(
        run_id=entry.run_id,
        status=entry.status,
        priority=entry.priority,
        devices=_devices(entry, alive),
        user=entry.user,
        project=entry.project,
        step=entry.step,
        planned_steps=entry.planned_steps,
        seconds_left=entry.seconds_left,
        kind=outlook.wait.kind,
        waits_for=outlook.wait.text,
        not_before=entry.not_before if outlook.wait.kind == "backoff" else None,
        starts_at=outlook.starts_at,
    )
