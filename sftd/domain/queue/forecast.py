"""What each waiting run waits for on these hosts, and when it will start as far as that can be known."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import HOST_DEVICES, need
from sftd.domain.queue.order import Entry, Gate, Limits, Wait
from sftd.domain.spec.launchers import LOCAL, kind_of

# Later starts are guesses on guesses.
_ROUNDS = 100


class HostCapacity(msgspec.Struct, frozen=True):
    """A living daemon's host: how many devices of each kind it has, and places by launcher. `limits` are those of the daemon,
    None for an older one, which did not report them."""

    daemon: str
    name: str
    gpus: int
    cpus: int
    places: Mapping[str, int] = {}
    limits: Limits | None = None

    @classmethod
    def of(cls, daemon: str, name: str, described: Mapping[str, int]) -> HostCapacity:
        """A host as its daemon describes it: devices, places and limits in one mapping (`Inventory.describe`)."""
        places = {k: n for k, n in described.items() if k not in HOST_DEVICES and not k.endswith("_limit")}
        gpus, cpus = described.get("gpus", 0), described.get("cpus", 0)
        return cls(daemon, name, gpus, cpus, places, Limits.told(described))

    def total(self, kind: str) -> int:
        """How many devices of a kind there are."""
        return {"cuda": self.gpus, "cpu": self.cpus}.get(kind, self.places.get(kind, 0))


class Outlook(msgspec.Struct, frozen=True):
    """What a run waits for, and when it is expected to start; None is unknown."""

    wait: Wait
    starts_at: Micros | None = None


class _Room:
    """The devices of a host that are free, and the run for which they are reserved."""

    def __init__(self, host: HostCapacity) -> None:
        self.host = host
        self._free = Counter({kind: host.total(kind) for kind in ("cuda", "cpu", *host.places)})
        # By launcher: the runs of one do not wait for those of another.
        self.reserved_for: dict[str, str] = {}

    @property
    def launchers(self) -> set[str]:
        """Who starts runs here."""
        return {LOCAL.name, *(name for name, places in self.host.places.items() if places)}

    def has(self, entry: Entry) -> bool | None:
        """Whether the run fits now; None when it never does."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        return (
            None
            if wanted.count > self.host.total(wanted.device)
            else wanted.count <= self._free[wanted.device]
        )

    def count(self, entry: Entry, sign: int) -> None:
        """The run takes its devices (-1) or gives them back (1)."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        self._free[wanted.device] += sign * wanted.count

    def lack(self, entry: Entry) -> tuple[int, str, int]:
        """How many devices the run needs, how people call them, and how many are free."""
        wanted = need(entry.demand, self.host.gpus, self.host.cpus)
        name = {"cuda": "GPUs", "cpu": "CPUs"}.get(wanted.device) or f"jobs on {kind_of(wanted.device).shown}"
        return wanted.count, name, max(0, self._free[wanted.device])


def look_ahead(
    waiting: list[Entry], running: list[Entry], hosts: list[HostCapacity], limits: Limits, now: Micros
) -> dict[str, Outlook]:
    """For each waiting run, by id. `waiting` is in the order in which runs start.

    A start is known when the runs before it end at a known time: those that have made a step do, at their pace so far.
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
                # What is free is reserved, for each launcher that would start these.
                if all(r.reserved_for.keys() >= r.launchers & launchers for r in rooms):
                    break
            elif wait.kind == "limit" and gate.is_closed(scopes):
                break
        left = [e for e in left if found[e.run_id].starts_at is None]
    return found


def _push(
    ends: list[tuple[Micros, str, Entry, _Room | None]], entry: Entry, room: _Room | None, now: Micros
) -> None:
    """The run has begun: note when it will give its devices back, if that can be known. One that was asked to stop does at
    its next step."""
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
    """Each waiting run in order, with what it waits for; one that starts takes its devices, in the room that is named."""
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
