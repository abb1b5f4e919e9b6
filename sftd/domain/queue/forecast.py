"""Forecast for waiting runs: the reason for the wait, and the expected start time if it is known."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import HOST_DEVICES, need
from sftd.domain.queue.order import Entry, Gate, Limits, Wait
from sftd.domain.spec.launch.launchers import LOCAL, kind_of

# The limit on simulated ends of runs: later starts are too uncertain.
_ROUNDS = 100


class HostCapacity(msgspec.Struct, frozen=True):
    """The host of a running daemon: number of devices by kind, and of places by launcher. `limits` are the daemon's, None if
    an older daemon does not report them."""

    daemon: str
    name: str
    gpus: int
    cpus: int
    places: Mapping[str, int] = {}
    limits: Limits | None = None

    @classmethod
    def of(cls, daemon: str, name: str, described: Mapping[str, int]) -> HostCapacity:
        """A host from its daemon's mapping of devices, places and limits (`Inventory.describe`)."""
        places = {k: n for k, n in described.items() if k not in HOST_DEVICES and not k.endswith("_limit")}
        gpus, cpus = described.get("gpus", 0), described.get("cpus", 0)
        return cls(daemon, name, gpus, cpus, places, Limits.told(described))

    def total(self, kind: str) -> int:
        """Number of devices of a kind."""
        return {"cuda": self.gpus, "cpu": self.cpus}.get(kind, self.places.get(kind, 0))


class Outlook(msgspec.Struct, frozen=True):
    """What a run waits for, and its expected start; None if unknown."""

    wait: Wait
    starts_at: Micros | None = None


class _Room:
    """The free devices of a host, and the runs for which they are reserved."""

    def __init__(self, host: HostCapacity) -> None:
        self.host = host
        self._free = Counter({kind: host.total(kind) for kind in ("cuda", "cpu", *host.places)})
        # Launcher → run id. Runs of different launchers do not wait for each other.
        self.reserved_for: dict[str, str] = {}

    @property
    def launchers(self) -> set[str]:
        """Names of the launchers of this host."""
        return {LOCAL.name, *(name for name, places in self.host.places.items() if places)}

    def has(self, entry: Entry) -> bool | None:
        """Whether the run fits now; None if it never fits."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        return (
            None
            if wanted.count > self.host.total(wanted.device)
            else wanted.count <= self._free[wanted.device]
        )

    def count(self, entry: Entry, sign: int) -> None:
        """Take (`sign` -1) or release (1) the devices of a run."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        self._free[wanted.device] += sign * wanted.count

    def lack(self, entry: Entry) -> tuple[int, str, int]:
        """(number of devices that the run needs, display name of their kind, number of free ones)."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        name = {"cuda": "GPUs", "cpu": "CPUs"}.get(wanted.device) or f"jobs on {kind_of(wanted.device).shown}"
        return wanted.count, name, max(0, self._free[wanted.device])


def look_ahead(
    waiting: list[Entry], running: list[Entry], hosts: list[HostCapacity], limits: Limits, now: Micros
) -> dict[str, Outlook]:
    """Run id → outlook, for each waiting run. `waiting` is in start order.

    A start time is known if the ends of the runs before it are known. The end of a run is known once it has made a step.
    """
    rooms = [_Room(host) for host in hosts]
    by_daemon = {room.host.daemon: room for room in rooms}
    gate = Gate(limits, running, now)
    ends: list[tuple[Micros, str, Entry, _Room | None]] = []
    for entry in running:
        room = by_daemon.get(entry.owner or "")
        if room is not None:
            room.count(entry, -1)
        _push(ends, entry, room, now)
    found = {}
    left = []
    for entry, wait, room in _go_through(waiting, gate, rooms):
        found[entry.run_id] = Outlook(wait, now if room else None)
        if room is not None:
            _push(ends, entry, room, now)
        elif wait.kind not in ("held", "too large", "checkpoint", "no daemon"):
            left.append(entry)
    launchers = {entry.demand.launcher for entry in left}
    scopes = gate.scopes(left)
    for _ in range(_ROUNDS):
        times = [e.not_before for e in left if e.not_before > gate.now]
        if ends:
            times.append(ends[0][0])
        if not left or not times:
            break
        gate.now = max(gate.now, min(times))
        while ends and ends[0][0] <= gate.now:
            _, run_id, entry, room = heapq.heappop(ends)
            gate.uncount(entry)
            if room is not None:
                room.count(entry, 1)
            if entry.status != "stopping":
                left = [_once_succeeded(e, run_id) for e in left]
        for entry, wait, room in _go_through(left, gate, rooms):
            if room is not None:
                found[entry.run_id] = Outlook(found[entry.run_id].wait, gate.now)
                _push(ends, entry, room, gate.now)
            elif wait.kind == "devices":
                # Stop when all rooms are reserved for every launcher of the remaining runs.
                if all(r.reserved_for.keys() >= r.launchers & launchers for r in rooms):
                    break
            elif wait.kind == "limit" and gate.is_closed(scopes):
                break
        left = [e for e in left if found[e.run_id].starts_at is None]
    return found


def _push(
    ends: list[tuple[Micros, str, Entry, _Room | None]], entry: Entry, room: _Room | None, now: Micros
) -> None:
    """Record when a started run will release its devices, if that is known. A stopping run does so at its next step."""
    left = entry.seconds_per_step if entry.status == "stopping" else entry.seconds_left
    if left is not None:
        heapq.heappush(ends, (now + int(left * 1_000_000), entry.run_id, entry, room))


def _once_succeeded(entry: Entry, run_id: str) -> Entry:
    if run_id not in entry.after:
        return entry
    return msgspec.structs.replace(entry, after={k: v for k, v in entry.after.items() if k != run_id})


def _go_through(
    waiting: list[Entry], gate: Gate, rooms: list[_Room]
) -> Iterator[tuple[Entry, Wait, _Room | None]]:
    """(run, wait, room in which it starts or None) for each waiting run in order. A run that starts takes its devices."""
    gate.forget_turns()
    for room in rooms:
        room.reserved_for = {}
    for entry in waiting:
        wait = gate.why_not(entry)
        if wait is not None:
            yield entry, wait, None
            continue
        wait, free = _find_room(entry, rooms)
        if free is not None:
            free.count(entry, -1)
            gate.count(entry)
        yield entry, wait, free


def _find_room(entry: Entry, rooms: list[_Room]) -> tuple[Wait, _Room | None]:
    if not rooms:
        return Wait("no daemon", "a daemon: none runs"), None
    rooms = [room for room in rooms if entry.only_on in (None, room.host.name)]
    if not rooms:
        return Wait("checkpoint", f"a daemon on {entry.only_on}, which has its checkpoint"), None
    launcher = entry.demand.launcher
    able = [room for room in rooms if room.has(entry) is not None]
    if not able:
        most = max(room.lack(entry)[0] for room in rooms)
        if not kind_of(launcher).uses_host_devices:
            return Wait("too large", f"a daemon with {kind_of(launcher).shown}: none has it"), None
        return Wait("too large", f"no daemon has {most} {rooms[0].lack(entry)[1]}"), None
    unreserved = [room for room in able if launcher not in room.reserved_for]
    for room in unreserved:
        if room.has(entry):
            return Wait("start", "about to start"), room
    if not unreserved:
        return Wait("behind", f"turn of {able[0].reserved_for[launcher]}"), None
    for room in unreserved:
        room.reserved_for[launcher] = entry.run_id
    count, kind, free = max((room.lack(entry) for room in unreserved), key=lambda lack: lack[2] - lack[0])
    return Wait("devices", f"{count} {kind}, {free} free"), None
