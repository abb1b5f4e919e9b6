"""Start order of the queue: higher priority first, then older runs.

A run waits for a user (held), another run (after), its back-off, its user's or project's limit, devices, or an earlier
run that waits for devices. The latter reserves devices as they become free, so that smaller runs cannot overtake it
forever. Runs that wait for something other than devices do not block others, with one exception: a run at its limit
blocks later runs of the same user or project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import Demand

# The longest back-off after a failure.
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
    """A run in the queue, waiting or driven by the daemon `owner`. `after` maps the runs that it waits for to their status.
    `only_on` is the host that has the checkpoint from which the run continues, None if any host can start it."""

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
        """Estimated seconds of training left; None before the first step."""
        if self.seconds_per_step is None:
            return None
        return max(0, self.planned_steps - self.step) * self.seconds_per_step


class Wait(msgspec.Struct, frozen=True):
    """What a run waits for: a kind, and a text for the user."""

    kind: WaitKind
    text: str


class Limits(msgspec.Struct, frozen=True):
    """The maximum number of devices that the runs of one user or project use at a time. Each rank counts as a device. None is
    no limit."""

    user: int | None = None
    project: int | None = None

    def describe(self) -> dict[str, int]:
        """The limits as a daemon reports them to others; 0 is no limit."""
        return {"user_limit": self.user or 0, "project_limit": self.project or 0}

    @classmethod
    def told(cls, described: Mapping[str, int]) -> Limits | None:
        """The limits from a daemon's report; None if an older daemon did not report them."""
        if "user_limit" not in described:
            return None
        return cls(described["user_limit"] or None, described.get("project_limit") or None)

    def loosened(self, other: Limits) -> Limits:
        """The effective limits if either daemon may start a run."""
        return Limits(
            None if self.user is None or other.user is None else max(self.user, other.user),
            None if self.project is None or other.project is None else max(self.project, other.project),
        )


def latest_wait(now: Micros) -> Micros:
    """The latest plausible end of a back-off. A later one was recorded before the clock was set back."""
    return now + int(MAX_BACKOFF_SECONDS * 1_000_000)


class Gate:
    """Decides whether a run must wait even if devices are free. Call `why_not` for the runs in their order."""

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
        """Add the devices of a run that starts."""
        for name, _ in self._scopes:
            self._used[name, getattr(entry, name)] += entry.demand.world

    def uncount(self, entry: Entry) -> None:
        """Subtract the devices of a run that has ended."""
        for name, _ in self._scopes:
            self._used[name, getattr(entry, name)] -= entry.demand.world

    def forget_turns(self) -> None:
        """Start again with the first run in order."""
        self._first.clear()

    def why_not(self, entry: Entry) -> Wait | None:
        """Why this run cannot start now, regardless of free devices; None if it needs only devices."""
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
                return Wait("limit", f"more devices than {name} {key[1]} may have: {world} of {limit}")
            if (first := self._first.get(key)) is not None:
                found = found or Wait("behind", f"turn of {first} ({name}'s limit)")
            elif self._used[key] + world > limit:
                # Later runs of the same scope wait, as smaller ones would starve this run.
                self._first[key] = entry.run_id
                found = found or Wait("limit", f"{name} {key[1]} has {self._used[key]} of {limit} devices")
        return found

    def scopes(self, entries: list[Entry]) -> list[set[tuple[str, str]]]:
        """For each limit, the users or projects of these runs."""
        return [{(name, getattr(entry, name)) for entry in entries} for name, _ in self._scopes]

    def is_closed(self, scopes: list[set[tuple[str, str]]]) -> bool:
        """Whether no later run with these `scopes` can start, because an earlier one of its scope waits at its limit."""
        return any(found and found <= self._first.keys() for found in scopes)

    def can_ever_pass(self, entry: Entry) -> bool:
        """Whether the limits allow this run at all."""
        return all(entry.demand.world <= limit for _, limit in self._scopes)


def choose_victims(
    head: Entry, running: list[Entry], lacking: int, count: Callable[[Entry], int]
) -> list[Entry]:
    """The runs to preempt for `head`, which lacks `lacking` devices: preemptible runs of lower priority, as few as possible,
    then of the lowest priority, then the most recently started. Empty if all of them together are not enough.

    `count` returns the number of devices of the kind that a run holds.
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
        # Choose this run if the largest remaining ones can supply the rest without exceeding the fewest runs.
        if len(chosen) < fewest and sum(map(count, chosen)) + count(entry) + sum(left) >= lacking:
            chosen.append(entry)
    return chosen


def stuck(waiting: Iterable[Entry], can_start: Callable[[Entry], bool]) -> set[str]:
    """Ids of waiting runs that cannot start without a user's action once no run is active: those that fail `can_start`, and
    those that wait for a run that is itself stuck or is not waiting."""
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
