"""A run's curves: of each step of the timeline the numbers that are plotted and compared, as columns (200,000 steps are a
dozen megabytes), and what the same pass over the log says of time and devices. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run import goodput
from sftd.domain.run.goodput import Fold, StepTime

# What a history is folded from; the other types say nothing of it.
TYPES = (*goodput.TYPES, e.AttemptLaunched.__name__)
# Column → its type code. `samples` are the first 64 bits of the digest: which rows a step saw.
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
}
_UNKNOWN = math.nan


class Point(StepTime, frozen=True):
    """Of a `StepCompleted`, all that curves need. These fields are in every schema version of it, or have defaults."""

    loss: float | str
    grad_norm: float | str
    lr: float | str
    tokens: int
    tokens_real: int
    samples_digest: str
    mfu: float | None = None
    peak_memory_bytes: int | None = None


class Curves:
    """The steps of a timeline without a gap, from `first` on, and its validations."""

    def __init__(self) -> None:
        self.first = 1
        self.columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._appends = [column.append for column in self.columns.values()]
        self._next = 1
        self.validations: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.columns["loss"])

    @property
    def last(self) -> int:
        """The last step; the one before the first where there is none."""
        return self.first + len(self) - 1

    def add(self, point: Point) -> None:
        """Take in the next step, or one again."""
        if point.step != self._next:
            self._make_room(point.step)
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
        )
        for append, value in zip(self._appends, values, strict=True):
            append(value)
        self._next += 1

    def _make_room(self, step: int) -> None:
        """Have `step` be the next."""
        if not len(self):
            self.first = step
        elif step < self._next:
            self.rewind(step - 1)
        # A step that is not in the log (an import that lost lines) leaves a hole, not a shift.
        for column in self.columns.values():
            for _ in range(self.first + len(column), step):
                column.append(_UNKNOWN if column.typecode == "d" else 0)
        self._next = step

    def rewind(self, step: int) -> None:
        """The timeline goes back to behind `step`."""
        keep = max(0, step - self.first + 1)
        for column in self.columns.values():
            del column[keep:]
        self._next = self.first + len(self)
        for later in [s for s in self.validations if s > step]:
            del self.validations[later]

    def at(self, name: str, step: int) -> float:
        """A number of a step."""
        return float(self.columns[name][step - self.first])

    def values(self, name: str, first: int, last: int) -> Sequence[float]:
        """A column's numbers from step `first` to step `last`, as far as there are any."""
        return self.columns[name][max(0, first - self.first) : max(0, last - self.first + 1)]

    def mean(self, name: str, first: int, last: int) -> float | None:
        """The mean of the finite numbers in a stretch of steps."""
        found = [v for v in self.values(name, first, last) if math.isfinite(v)]
        return math.fsum(found) / len(found) if found else None

    def mean_over_time(self, name: str, first: int, last: int) -> float | None:
        """The same, each step counted for as long as it took."""
        pairs = zip(self.values(name, first, last), self.values("seconds", first, last), strict=True)
        return mean_over_time(pairs)

    def lowest(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the lowest finite number."""
        column = self.columns[name]
        least = min((v for v in column if math.isfinite(v)), default=None)
        return None if least is None else (self.first + column.index(least), least)


def mean_over_time(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The mean of a rate, from (rate, seconds); None where no step tells both."""
    known = [(rate, seconds) for rate, seconds in pairs if math.isfinite(rate) and seconds > 0]
    total = math.fsum(seconds for _, seconds in known)
    return math.fsum(rate * seconds for rate, seconds in known) / total if known else None


def _bits(digest: str) -> int:
    try:
        return int(digest[:16], 16)
    except ValueError:
        # Not the hexadecimal digits of a sha256.
        return int.from_bytes(digest.encode()[:8])


class Bucket(msgspec.Struct, frozen=True):
    """Neighbouring steps as one point of a plot. Extremes are kept, so that a spike of one step is still seen; None where
    none of the numbers is finite. `odd` counts those that are not."""

    first: int
    last: int
    mean: float | None
    low: float | None
    high: float | None
    odd: int


def width_for(curves: Iterable[Curves], count: int) -> int:
    """Steps in a bucket, so that `count` buckets hold what is between the first and the last step of all curves (one more
    where the first is not a bucket's)."""
    known = [one for one in curves if len(one)]
    span = max(one.last for one in known) - min(one.first for one in known) + 1 if known else 0
    return max(1, -(-span // count))


def thin(curves: Curves, name: str, width: int) -> Iterator[Bucket]:
    """A column in buckets of `width` steps. They begin at step 1, so that those of several runs lie side by side."""
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


class Turn(msgspec.Struct):
    """An attempt's hold on devices. `ended_at` is None while it goes on, `devices` until it was launched."""

    began_at: e.Micros
    devices: int | None = None
    ended_at: e.Micros | None = None


class History:
    """Folds a run's events of `TYPES`, in order, into its curves, its goodput ledger and its turns on devices. A fork's
    `curves` are those of its parent up to where it left, to be gone on with."""

    def __init__(self, curves: Curves | None = None) -> None:
        self.curves = curves if curves is not None else Curves()
        self.fold = Fold()
        self.turns: list[Turn] = []
        self.version = 0

    def add(self, version: int, at: e.Micros, event: e.Event | Point) -> None:
        """Take in the next event."""
        self.version = version
        if not isinstance(event, e.AttemptLaunched):
            self.fold.add(at, event)
        if isinstance(event, Point):
            self.curves.add(event)
        elif isinstance(event, e.ValidationCompleted):
            self.curves.validations[event.step] = event.loss
        elif isinstance(event, e.AttemptClaimed):
            self.curves.rewind(event.from_step)
            self.turns.append(Turn(at))
        elif isinstance(event, e.AttemptLaunched):
            if self.turns and event.devices:
                self.turns[-1].devices = len(event.devices)
        elif event.ends_attempt and self.turns and self.turns[-1].ended_at is None:
            self.turns[-1].ended_at = at

    def device_seconds(self, now: e.Micros, world: int) -> float:
        """Devices × the time for which attempts held them, up to `now`; `world` is how many where no launch tells."""
        return math.fsum(
            (turn.devices or world) * max(0, (turn.ended_at or now) - turn.began_at) / 1e6
            for turn in self.turns
        )
