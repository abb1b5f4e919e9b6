"""Curves on a terminal: lines of braille dots. Letters on them distinguish the curves without colour."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import msgspec

from sftd.domain.compare.curves import Bucket

if TYPE_CHECKING:
    from rich.text import Text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
_BARS = "▁▂▃▄▅▆▇█"
# A cell is 2 dots wide and 4 high; these are their bits, by column and row.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
# A maximum at this multiple of the median distance from the mean is a spike, and drawn; noise below it is not.
_SPIKE = 4.0
# A spike is drawn to scale if it exceeds the curve by at most this share of its height.
_BEYOND = 0.5
# Columns between two letters of the same curve.
_LETTER_EVERY = 12


class Series(msgspec.Struct, frozen=True):
    """A curve with its letter; an empty letter is not written."""

    letter: str
    buckets: list[Bucket]


def colour(number: int) -> str:
    """The colour of the curve with this number, from 0."""
    return COLOURS[number % len(COLOURS)]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars; one that is not finite is a cross."""
    shown = values[-width:]
    finite = [v for v in shown if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] if math.isfinite(v) else "×" for v in shown)


def number(value: float) -> str:
    """A number of an axis in at most 8 columns."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else f"{value:.3g}"


def plot(
    series: Sequence[Series], width: int, height: int, *, log: bool = False, plain: bool = False
) -> Iterator[Text]:
    """Lines of text: the curves over their steps. `plain` uses letters alone, for terminals without braille."""
    from rich.text import Text

    shown = [b for s in series for b in s.buckets if b.mean is not None]
    if not shown:
        yield Text("no step has a finite loss yet", "dim")
        return
    scale = scale_of(s.buckets for s in series)
    low, high = scale.low, scale.high
    is_log = log and low > 0
    place = math.log if is_log else float
    canvas = _Canvas(max(10, width - 10), height, shown, place(low), place(high), place)
    for n, s in enumerate(series):
        canvas.draw(s, scale.tall[n], n, len(series))
    labels = {0: number(high), height - 1: number(low)}
    if height >= 5:
        middle = (place(low) + place(high)) / 2
        labels[height // 2] = number(math.exp(middle) if is_log else middle)
    for row in range(height):
        tick, axis_line = "+|" if plain else "┤│"
        axis = f"{labels.get(row, ''):>8} {tick if row in labels else axis_line}"
        line = Text.assemble((axis, "dim"))
        # Neighbours of one style are one piece: less to send over a slow line.
        for style, cells in groupby(canvas.cells(row, plain), key=_style):
            line.append("".join(text for text, _ in cells), style)
        line.rstrip()
        yield line
    first, last = min(b.first for b in shown), max(b.last for b in shown)
    ends = f"step {first}", f"{last}{'  (log)' if is_log else ''}"
    yield Text(" " * 10 + ends[0] + ends[1].rjust(canvas.width - len(ends[0])), "dim")
    if scale.highest > high:
        mark = "^" if plain else "▲"
        yield Text(" " * 10 + f"{mark} beyond the top: up to {number(scale.highest)}", "dim")


def _style(cell: tuple[str, int | None]) -> str:
    text, owner = cell
    return "" if owner is None else f"bold {colour(owner)}" if text.isalpha() else colour(owner)


class Scale(msgspec.Struct, frozen=True):
    """The range of a plot, the spikes of each of its curves, and the value of the highest spike."""

    low: float
    high: float
    highest: float
    tall: list[list[Bucket]]


def scale_of(curves: Iterable[Sequence[Bucket]]) -> Scale:
    """The scale of a plot of curves with at least one finite point. A spike is cut at the top if a scale with room for it
    would flatten the curve."""
    given = list(curves)
    tall = [_tall(buckets) for buckets in given]
    # Many spikes are the curve itself, which fell far and then stayed flat.
    few = [
        found for found, buckets in zip(tall, given, strict=True) if len(found) <= max(2, len(buckets) // 50)
    ]
    spikes = {id(b) for found in few for b in found}
    shown = [b for buckets in given for b in buckets if b.mean is not None]
    means = [b.mean for b in shown if b.mean is not None]
    low = min(means)
    high = max((b.mean for b in shown if b.mean is not None and id(b) not in spikes), default=max(means))
    highest = max((b.high for found in few for b in found if b.high is not None), default=high)
    if len(few) < len(tall):
        high = max(high, *(b.high for found in tall for b in found if b.high is not None))
    if highest <= high + _BEYOND * (high - low) or high == low:
        high = highest = max(high, highest)
    return Scale(low, high, highest, tall)


def _tall(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Buckets with a spike: far above their own mean, or above the buckets beside them."""
    finite = [b for b in buckets if b.mean is not None]
    means = [b.mean or 0.0 for b in finite]
    above = [(b.high or 0.0) - (b.mean or 0.0) for b in finite]
    moves = [abs(after - before) for before, after in pairwise(means)]
    inside, between = statistics.median(above or [0.0]), statistics.median(moves or [0.0])
    found = []
    for n, b in enumerate(finite):
        beside = (*means[max(0, n - 2) : n], *means[n + 1 : n + 3])
        is_spike = bool(beside) and 0 < n < len(finite) - 1 and means[n] - max(beside) > _SPIKE * between > 0
        if is_spike or above[n] > _SPIKE * inside > 0:
            found.append(b)
    return found


class _Canvas:
    """Cells of dots; each belongs to the curve that was drawn there last."""

    def __init__(
        self,
        width: int,
        height: int,
        shown: Sequence[Bucket],
        low: float,
        high: float,
        place: Callable[[float], float],
    ) -> None:
        self.width, self.height = width, height
        self._first = min(b.first for b in shown)
        self._span = max(1, max(b.last for b in shown) - self._first)
        self._low, self._place = low, place
        self._high = high
        self._scale = (4 * height - 1) / (high - low) if high > low else 0.0
        self._bits = [[0] * width for _ in range(height)]
        self._owner: list[list[int | None]] = [[None] * width for _ in range(height)]
        self._letters: dict[tuple[int, int], tuple[str, int]] = {}

    def _x(self, step: float) -> int:
        return round((step - self._first) / self._span * (2 * self.width - 1))

    def _y(self, value: float) -> int:
        level = round((self._place(value) - self._low) * self._scale) if self._scale else 2 * self.height
        return min(4 * self.height - 1, max(0, 4 * self.height - 1 - level))

    def _dot(self, x: int, y: int, owner: int) -> None:
        self._bits[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
        self._owner[y // 4][x // 2] = owner

    def draw(self, series: Series, tall: Sequence[Bucket], number: int, count: int) -> None:
        """Draw a curve: a line through the means, and its spikes."""
        before: tuple[int, int] | None = None
        path: dict[int, int] = {}
        for b in series.buckets:
            if b.mean is None:
                before = None
                continue
            here = self._x((b.first + b.last) / 2), self._y(b.mean)
            for x, y in _line(before or here, here):
                self._dot(x, y, number)
                path.setdefault(x // 2, y // 4)
            before = here
        for b in tall:
            if b.high is not None and b.mean is not None:
                x = self._x((b.first + b.last) / 2)
                for y in range(self._y(b.high), self._y(b.mean)):
                    self._dot(x, y, number)
                if self._place(b.high) > self._high:
                    self._letters[0, x // 2] = "▲", number
        if not series.letter or not path:
            return
        # Where curves coincide, their letters are side by side.
        every = max(_LETTER_EVERY, 3 * count)
        columns = [x for x in sorted(path) if x % every == (3 * number + 1) % every]
        for x in columns or [max(path)]:
            # From the 27th curve, a letter has two characters, one in a cell.
            for n, character in enumerate(series.letter[: self.width - x]):
                self._letters[path[x], x + n] = character, number

    def cells(self, row: int, plain: bool) -> Iterator[tuple[str, int | None]]:
        """The cells of a row, each with the number of its curve."""
        for x in range(self.width):
            if (row, x) in self._letters:
                text, writer = self._letters[row, x]
                yield ("^" if plain and text == "▲" else text), writer
            elif bits := self._bits[row][x]:
                owner = self._owner[row][x]
                yield (LETTERS[(owner or 0) % 26] if plain else chr(0x2800 + bits)), owner
            else:
                yield " ", None


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    for n in range(steps + 1):
        yield x0 + round((x1 - x0) * n / steps), y0 + round((y1 - y0) * n / steps)
