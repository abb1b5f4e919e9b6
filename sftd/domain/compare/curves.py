"""A run's curves: the plotted and compared numbers of each timeline step, as columns (200,000 steps take about 12 MB).
The same pass over the log collects time and device use. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from sftd.domain.log import events as e
from sftd.domain.log.timeline import Line, Timeline
from sftd.domain.run import goodput
from sftd.domain.run.goodput import Fold, StepTime

# The event types that `RunCurves` reads.
TYPES = (*goodput.TYPES, e.AttemptLaunched.__name__)
# Column → its array type code. `samples` holds the first 64 bits of the digest of the rows that a step saw.
_COLUMNS = {
    "loss": "d",
    "grad_norm": "d",
    "lr": "d",
    "tokens": "q",
    "samples": "Q",
    "tokens_real": "q",
    "seconds": "d",
    "mfu": "d",
    "memory": "q",
    "token_accuracy": "d",
}
_UNKNOWN = math.nan


class CurvePoint(StepTime, frozen=True):
    """The fields of `StepCompleted` that curves need. Every schema version has them, or they have defaults."""

    loss: float | str
    grad_norm: float | str
    lr: float | str
    tokens: int
    tokens_real: int
    samples_digest: str
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    token_accuracy: float | None = None


class Curves:
    """The steps of a timeline from `first` to `last`, and its validations. Takes a run's events of `TYPES`, in order."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        # Every step in the log, redone ones included; `columns` holds only the timeline's steps.
        self._recorded: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._appends = [column.append for column in self._recorded.values()]
        self._columns: dict[str, array[Any]] | None = None
        # (step, place of the validated step or None if the log does not have that step, loss)
        self._validations: list[tuple[int, int | None, float]] = []

    def __len__(self) -> int:
        return self.last - self.first + 1

    @property
    def first(self) -> int:
        """The first step."""
        line = self.timeline.line
        return line[0].first if line else 1

    @property
    def last(self) -> int:
        """The last step; 0 where there is none."""
        line = self.timeline.line
        return line[-1].last if line else 0

    @property
    def columns(self) -> dict[str, array[Any]]:
        """Column → values of the steps `first` to `last`. A step missing from the log has NaN (0 in integer columns)."""
        if self._columns is None:
            line = self.timeline.line
            is_whole = (
                len(line) == 1 and line[0].place == 0 and self.last == self.timeline.count + self.first - 1
            )
            self._columns = (
                self._recorded
                if is_whole
                else {name: _joined(column, line) for name, column in self._recorded.items()}
            )
        return self._columns

    @property
    def validations(self) -> dict[int, float]:
        """Step → loss of the timeline's validations."""
        known, place = self._validations, self.timeline.place
        at = {step: place(step) for step in {step for step, _, _ in known} if step <= self.timeline.last}
        return {step: loss for step, found, loss in known if step in at and at[step] == found}

    def take(self, event: e.Event) -> None:
        """Take in an event that is not a step."""
        self.timeline.add(event)
        self._columns = None
        if isinstance(event, e.ValidationCompleted):
            self._validations.append((event.step, self.timeline.place(event.step), event.loss))

    def add(self, point: CurvePoint) -> None:
        """Take in the next step."""
        self.timeline.add_step(point.step)
        self._columns = None
        values = (
            float(point.loss),
            float(point.grad_norm),
            float(point.lr),
            point.tokens,
            _bits(point.samples_digest),
            point.tokens_real,
            float(point.seconds),
            _UNKNOWN if point.mfu is None else point.mfu,
            point.peak_memory_bytes or 0,
            _UNKNOWN if point.token_accuracy is None else point.token_accuracy,
        )
        for append, value in zip(self._appends, values, strict=True):
            append(value)

    def tail(self, count: int) -> Curves:
        """Curves of the last `count` steps only."""
        found, first = Curves(), max(self.first, self.last - count + 1)
        for name, column in found._recorded.items():
            column.extend(self.values(name, first, self.last))
        for step in range(first, self.last + 1):
            found.timeline.add_step(step)
        return found

    def at(self, name: str, step: int) -> float:
        """The value of column `name` at `step`."""
        return float(self.columns[name][step - self.first])

    def values(self, name: str, first: int, last: int) -> Sequence[float]:
        """A column's values from step `first` to step `last`, limited to the steps that exist."""
        return self.columns[name][max(0, first - self.first) : max(0, last - self.first + 1)]

    def mean(self, name: str, first: int, last: int) -> float | None:
        """The mean of the finite values from step `first` to step `last`; None if there are none."""
        found = [v for v in self.values(name, first, last) if math.isfinite(v)]
        return math.fsum(found) / len(found) if found else None

    def mean_over_time(self, name: str, first: int, last: int) -> float | None:
        """The mean weighted by the duration of each step; None if no step has both a finite value and a duration."""
        pairs = zip(self.values(name, first, last), self.values("seconds", first, last), strict=True)
        known = [(rate, seconds) for rate, seconds in pairs if math.isfinite(rate) and seconds > 0]
        total = math.fsum(seconds for _, seconds in known)
        return math.fsum(rate * seconds for rate, seconds in known) / total if known else None

    def lowest(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the lowest finite value; None if there are none."""
        column = self.columns[name]
        least = min((v for v in column if math.isfinite(v)), default=None)
        return None if least is None else (self.first + column.index(least), least)


def _joined(column: array[Any], line: Line) -> array[Any]:
    """The values of a line's steps. A gap in the log is filled, so that later steps keep their index."""
    lost: array[Any] = array(column.typecode, [_UNKNOWN if column.typecode == "d" else 0])
    found: array[Any] = array(column.typecode)
    for s in line:
        found.extend(lost * (s.first - line[0].first - len(found)))
        found.extend(column[s.place : s.place + s.last - s.first + 1])
    return found


def _bits(digest: str) -> int:
    try:
        return int(digest[:16], 16)
    except ValueError:
        # The digest is not hexadecimal.
        return int.from_bytes(digest.encode()[:8])


class Bucket(msgspec.Struct, frozen=True):
    """Consecutive steps as one point of a plot. `low` and `high` keep a spike of a single step visible. `mean`, `low` and
    `high` are None if no value is finite. `odd` counts the values that are not finite."""

    first: int
    last: int
    mean: float | None
    low: float | None
    high: float | None
    odd: int


def width_for(curves: Iterable[Curves], count: int) -> int:
    """Steps per bucket so that `count` buckets cover all steps of all curves (`count` + 1 if the first step is not the
    first of its bucket)."""
    known = [one for one in curves if len(one)]
    span = max(one.last for one in known) - min(one.first for one in known) + 1 if known else 0
    return max(1, -(-span // count))


def thin(curves: Curves, name: str, width: int) -> Iterator[Bucket]:
    """A column in buckets of `width` steps. Buckets are counted from step 1, so that those of several runs align."""
    if not len(curves):
        return
    for start in range((curves.first - 1) // width * width + 1, curves.last + 1, width):
        first, last = max(start, curves.first), min(start + width - 1, curves.last)
        values = curves.values(name, first, last)
        finite = [v for v in values if math.isfinite(v)]
        odd = len(values) - len(finite)
        if finite:
            yield Bucket(first, last, math.fsum(finite) / len(finite), min(finite), max(finite), odd)
        else:
            yield Bucket(first, last, None, None, None, odd)


class CurveTurn(msgspec.Struct):
    """The time for which an attempt holds devices. `devices` is None until launch, `ended_at` until the attempt ends."""

    began_at: e.Micros
    devices: int | None = None
    ended_at: e.Micros | None = None


class RunCurves:
    """Folds a run's events of `TYPES`, in order, into its curves, goodput ledger and device turns. A fork continues the
    `curves` of its parent."""

    def __init__(self, curves: Curves | None = None) -> None:
        self.curves = curves if curves is not None else Curves()
        self.fold = Fold()
        self.turns: list[CurveTurn] = []
        self.version = 0

    def add(self, version: int, at: e.Micros, event: e.Event | CurvePoint) -> None:
        """Take in the next event."""
        self.version = version
        if not isinstance(event, e.AttemptLaunched):
            self.fold.add(at, event)
        if isinstance(event, CurvePoint):
            self.curves.add(event)
            return
        self.curves.take(event)
        if isinstance(event, e.AttemptClaimed):
            self.turns.append(CurveTurn(at))
        elif isinstance(event, e.AttemptLaunched):
            if self.turns and event.devices:
                self.turns[-1].devices = len(event.devices)
        elif event.ends_attempt and self.turns and self.turns[-1].ended_at is None:
            self.turns[-1].ended_at = at

    def device_seconds(self, now: e.Micros, world: int) -> float:
        """Device-seconds of all attempts up to `now`. `world` is the number of devices of an attempt without a launch event."""
        return math.fsum(
            (turn.devices or world) * max(0, (turn.ended_at or now) - turn.began_at) / 1e6
            for turn in self.turns
        )
