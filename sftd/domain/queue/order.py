"""Whose turn it is. Runs start in order: higher priority first, then the older. What a run waits for is one of:

a person (held), another run (after), its back-off, its user's or project's limit, devices, or a run before it that waits
for devices: that one reserves what becomes free, so smaller ones do not overtake it forever. Runs that wait for anything
but devices hold up nobody else, except that a run at its limit is not overtaken by others of the same user or project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import Demand

# No failure makes a run wait for longer.
MAX_BACKOFF_SECONDS = 600.0

WaitKind = Literal[
    "start",
    "held",
    "after",
    "backoff",
    "limit",
    "devices",
    "behind",
    "too large",
    "checkpoint",
    "no daemon",
]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A run in the queue, waiting or driven by `owner`. `after` maps the runs that it waits for, which have not
    succeeded, to their status. `only_on` is the host that has the checkpoint from which it goes on, None where any host will do."""

    run_id: str
    priority: int
    demand: Demand
    status: str = "queued"
    user: str = ""
    project: str = ""
    is_held: bool = False
    enqueued_at: Micros = 0
    not_before: Micros = 0
    started_at: Micros | None = None
    owner: str | None = None
    step: int = 0
    planned_steps: int = 0
    seconds_per_step: float | None = None
    after: dict[str, str] = {}
    only_on: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training left, by the steps so far; None before the first step."""
        if self.seconds_per_step is None:
            return None
        return max(0, self.planned_steps - self.step) * self.seconds_per_step


class Wait(msgspec.Struct, frozen=True):
    """What a run waits for, as a kind and in words; the words name what has to happen."""

    kind: WaitKind
    text: str


class Limits(msgspec.Struct, frozen=True):
    """The most devices that the runs of one user, or of one project, have at once. A device is a rank. None is no limit."""

    user: int | None = None
    project: int | None = None

    def describe(self) -> dict[str, int]:
        """As a daemon tells them to others; 0 is no limit."""
        return {"user_limit": self.user or 0, "project_limit": self.project or 0}

    @classmethod
    def told(cls, described: Mapping[str, int]) -> Limits | None:
        """What a daemon told; None of an older one, which did not."""
        if "user_limit" not in described:
            return None
        return cls(described["user_limit"] or None, described.get("project_limit") or None)

    def loosened(self, other: Limits) -> Limits:
        """What holds where either daemon may start a run."""
        return Limits(
            None if self.user is None or other.user is None else max(self.user, other.user),
            None if self.project is None or other.project is None else max(self.project, other.project),
        )


def latest_wait(now: Micros) -> Micros:
    """The latest time for which a run can be waiting: a later one was written by a clock that has been set back since."""
    return now + int(MAX_BACKOFF_SECONDS * 1_000_000)


class Gate:
    """What keeps a run waiting even if devices are free. Runs are to be asked about in their order."""

    def __init__(self, limits: Limits, running: Iterable[Entry], now: Micros) -> None:
        self.now = now
        self._scopes = [
            (name, limit) for name, limit in (("user", limits.user), ("project", limits.project)) if limit
        ]
        self._used: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}
        if self._scopes:
            for entry in running:
                self.count(entry)

    def count(self, entry: Entry) -> None:
        """This run has its devices."""
        for name, _ in self._scopes:
            self._used[name, getattr(entry, name)] += entry.demand.world

    def uncount(self, entry: Entry) -> None:
        """This run has given its devices back."""
        for name, _ in self._scopes:
            self._used[name, getattr(entry, name)] -= entry.demand.world

    def forget_turns(self) -> None:
        """Ask anew from the first run in order."""
        self._first.clear()

    def why_not(self, entry: Entry) -> Wait | None:
        """Why this run does not start now whatever devices are free; None when nothing but devices can be in its way."""
        if entry.is_held:
            return Wait("held", "`sftd release`")
        for other, status in entry.after.items():
            return Wait("after", f"{other} ({status})")
        if self.now < entry.not_before <= latest_wait(self.now):
            return Wait("backoff", "its next try")
        return self._limited(entry)

    def _limited(self, entry: Entry) -> Wait | None:
        found = None
        for name, limit in self._scopes:
            key = (name, getattr(entry, name))
            world = entry.demand.world
            if world > limit:
                return Wait("limit", f"more than {name} {key[1]} may have: {world} of {limit}")
            if (first := self._first.get(key)) is not None:
                found = found or Wait("behind", f"turn of {first} ({name}'s limit)")
            elif self._used[key] + world > limit:
                # Not overtaken by smaller ones of the same scope, which would starve it.
                self._first[key] = entry.run_id
                found = found or Wait("limit", f"{name} {key[1]} has {self._used[key]} of {limit} devices")
        return found

    def scopes(self, entries: list[Entry]) -> list[set[tuple[str, str]]]:
        """For each limit, those of whom these runs are."""
        return [{(name, getattr(entry, name)) for entry in entries} for name, _ in self._scopes]

    def is_closed(self, scopes: list[set[tuple[str, str]]]) -> bool:
        """Whether none of the runs with these `scopes` that are still to be asked about can start: it would overtake one."""
        return any(found and found <= self._first.keys() for found in scopes)

    def can_ever_pass(self, entry: Entry) -> bool:
        """Whether the limits have room for this run at all."""
        return all(entry.demand.world <= limit for _, limit in self._scopes)


def choose_victims(
    head: Entry, running: list[Entry], lacking: int, count: Callable[[Entry], int]
) -> list[Entry]:
    """The runs that make room for `head`, which lacks so many devices: preemptible ones of lower priority, as few as
    possible, then those of the lowest priority, then those that began last. Empty when all of them would not be enough.

    `count` says how many devices of the kind a run has.
    """
    able = [r for r in running if r.demand.preemptible and r.priority < head.priority and count(r) > 0]
    able.sort(key=lambda r: (r.priority, -(r.started_at or 0), r.run_id))
    if lacking <= 0 or sum(map(count, able)) < lacking:
        return []
    sizes = sorted(map(count, able), reverse=True)
    fewest = next(n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= lacking)
    chosen: list[Entry] = []
    for position, entry in enumerate(able):
        left = sorted(map(count, able[position + 1 :]), reverse=True)[: fewest - len(chosen) - 1]
        # Taken if those still to come can fill up what it leaves open, without being more than the fewest.
        if len(chosen) < fewest and sum(map(count, chosen)) + count(entry) + sum(left) >= lacking:
            chosen.append(entry)
    return chosen


def stuck(waiting: Iterable[Entry], can_start: Callable[[Entry], bool]) -> set[str]:
    """Ids of the waiting runs that will not start without a person, once nothing runs any more: those that `can_start`
    says no to, and those that wait for a run that does not wait itself or is stuck, too."""
    entries = {entry.run_id: entry for entry in waiting}
    found = {run_id for run_id, entry in entries.items() if not can_start(entry)}
    while True:
        more = {
            run_id
            for run_id, entry in entries.items()
            if run_id not in found and any(other in found or other not in entries for other in entry.after)
        }
        if not more:
            return found
        found |= more
