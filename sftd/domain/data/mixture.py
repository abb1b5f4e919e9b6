"""Mixtures: the source that each place of the sample order reads, and the row of it, without stored state.

A mixture is a list of segments with fixed weights. Within a segment the places go to the sources by Webster's method
(Sainte-Laguë): the k-th row (from 0) of a source of weight w has the priority (2k + 1) / w, and the places are filled in the order
of the priorities, ties in the order of the sources. So the rows of each source in any number of places have a closed form, never
stray far from the shares, and equal whole quotas exactly. A stage, or the end of a source that is not repeated, begins a segment.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import msgspec

from sftd.domain.data.facts import SourceFacts
from sftd.domain.spec.data_section import Data, Source
from sftd.domain.spec.spec import Spec


class SourceSize(msgspec.Struct, frozen=True):
    """What a mixture needs of a source's files: usable rows, and their trained tokens."""

    rows: int
    tokens: int


class MixtureStart(msgspec.Struct, frozen=True):
    """Where a fork's mixture begins: after `step` steps, with the rows of each source that were read before, by name."""

    step: int = 0
    cursors: dict[str, int] = {}

    @property
    def position(self) -> int:
        """The place in the sample order."""
        return sum(self.cursors.values())


FROM_THE_FIRST_ROWS = MixtureStart()


class _Segment(msgspec.Struct, frozen=True):
    """Places from `start` on. `cursors`: rows of each source that were read before. `steps`: a source's priorities are its odd
    multiples of this number; None if it is not read."""

    start: int
    cursors: tuple[int, ...]
    steps: tuple[int | None, ...]

    def counts(self, places: int) -> list[int]:
        """Rows of each source in the first `places` places."""
        read = [step for step in self.steps if step is not None]
        # The priority that all sources would reach together, were rows divisible.
        threshold = 2 * places / sum(Fraction(1, step) for step in read)
        counts = [_odd_multiples(step, math.floor(threshold)) for step in self.steps]
        left = places - sum(counts)
        for _ in range(left):
            counts[min(self._priorities(counts))[1]] += 1
        for _ in range(-left):
            last = max((p - 2 * step, s) for p, s in self._priorities(counts) if (step := self.steps[s]))
            counts[last[1]] -= 1
        return counts

    def _priorities(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Priority and source of each source's next row."""
        for source, (count, step) in enumerate(zip(counts, self.steps, strict=True)):
            if step is not None:
                yield (2 * count + 1) * step, source

    def places_until(self, source: int, row: int) -> int:
        """Number of places up to and with row `row` (from 0) of a source."""
        own = self.steps[source]
        assert own is not None
        priority = (2 * row + 1) * own
        return 1 + sum(
            _odd_multiples(step, priority if other < source else priority - 1)
            for other, step in enumerate(self.steps)
        )

    def rows(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        """Source and row (counted over all epochs) of the places from `place` of the segment on."""
        counts = self.counts(place)
        heap = list(self._priorities(counts))
        heapq.heapify(heap)
        for _ in range(count):
            priority, source = heap[0]
            yield source, self.cursors[source] + counts[source]
            counts[source] += 1
            step = self.steps[source]
            assert step is not None
            heapq.heapreplace(heap, (priority + 2 * step, source))


def _odd_multiples(step: int | None, limit: int) -> int:
    """How many of step, 3 · step, 5 · step … are at most `limit`."""
    return 0 if step is None or limit < 0 else (limit // step + 1) // 2


class Mixture:
    """The endless stream of rows of several sources."""

    def __init__(
        self,
        data: Data,
        sizes: Sequence[SourceSize],
        *,
        batch_size: int,
        start: MixtureStart = FROM_THE_FIRST_ROWS,
    ) -> None:
        """`sizes`: of the files of each source, in order. A stage ends with the last place of its step, if every step since
        `start` has `batch_size` samples."""
        self.sources = data.sources
        self.rows = tuple(rows_of(source, size) for source, size in zip(data.sources, sizes, strict=True))

        def weights(changed: Mapping[str, float]) -> list[Fraction]:
            return [
                _weight(source, changed.get(source.name, source.weight), size, data.weights_by)
                for source, size in zip(data.sources, sizes, strict=True)
            ]

        stages = [(0, weights({}))]
        for stage in reversed(data.stages):
            end = start.position + max(0, stage.until_step - start.step) * batch_size
            stages = [(0, weights(stage.weights)), *((max(at, end), later) for at, later in stages)]
        cursors = [start.cursors.get(source.name, 0) for source in data.sources]
        self._segments = list(self._cut(stages, start.position, cursors))
        self._starts = [segment.start for segment in self._segments]

    @property
    def epoch_rows(self) -> int | None:
        """Places of one pass over all sources; None if one is repeated as often as its weight asks for."""
        limits = [limit(source, rows) for source, rows in zip(self.sources, self.rows, strict=True)]
        return None if None in limits else sum(filter(None, limits))

    def at(self, position: int, count: int) -> list[tuple[int, int]]:
        """Source, and row of it counted over all of its epochs, at each of `count` places from `position` on."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            place = position + len(found)
            number = bisect_right(self._starts, place) - 1
            segment = self._segments[number]
            is_last = number + 1 == len(self._segments)
            left = count - len(found)
            taken = left if is_last else min(left, self._starts[number + 1] - place)
            found += segment.rows(place - segment.start, taken)
        return found

    def cursors(self, position: int) -> dict[str, int]:
        """Rows of each source before `position`."""
        segment = self._segments[bisect_right(self._starts, position) - 1]
        counts = segment.counts(position - segment.start)
        before = [cursor + count for cursor, count in zip(segment.cursors, counts, strict=True)]
        return {source.name: rows for source, rows in zip(self.sources, before, strict=True)}

    def epoch(self, position: int) -> int:
        """Completed passes of the source that has the fewest, before `position`."""
        cursors = self.cursors(position).values()
        return min(cursor // rows for cursor, rows in zip(cursors, self.rows, strict=True))

    def _cut(
        self, stages: Sequence[tuple[int, Sequence[Fraction]]], position: int, cursors: Sequence[int]
    ) -> Iterator[_Segment]:
        limits = [limit(source, rows) for source, rows in zip(self.sources, self.rows, strict=True)]
        while True:
            number = max(n for n, (at, _) in enumerate(stages) if at <= position)
            end = stages[number + 1][0] if number + 1 < len(stages) else None
            wanted = stages[number][1]
            ended = [
                most is not None and cursor >= most for cursor, most in zip(cursors, limits, strict=True)
            ]
            weights = [Fraction(0) if over else weight for weight, over in zip(wanted, ended, strict=True)]
            # All that the stage reads has ended: it begins again.
            is_again = not any(weights)
            segment = _Segment(position, tuple(cursors), _steps(wanted if is_again else weights))
            yield segment
            if not is_again:
                for source, most in enumerate(limits):
                    if most is not None and weights[source]:
                        over = position + segment.places_until(source, most - cursors[source] - 1)
                        end = over if end is None else min(end, over)
            if end is None:
                return
            counts = segment.counts(end - position)
            cursors = [cursor + count for cursor, count in zip(cursors, counts, strict=True)]
            position = end


def of_facts(
    spec: Spec, sources: Sequence[SourceFacts], start: MixtureStart = FROM_THE_FIRST_ROWS
) -> Mixture:
    """The mixture of a spec whose sources have been read."""
    sizes = [SourceSize(source.rows, source.tokens) for source in sources]
    return Mixture(spec.data, sizes, batch_size=spec.data.train_batch_size, start=start)


def rows_of(source: Source, size: SourceSize) -> int:
    """Rows of one epoch of a source."""
    return size.rows if source.max_rows is None else min(size.rows, source.max_rows)


def limit(source: Source, rows: int) -> int | None:
    """Rows after which a source of `rows` rows has ended; None if it is repeated."""
    if source.weight is None:
        return math.ceil(_exact(1.0 if source.epochs is None else source.epochs) * rows)
    return rows if source.on_exhausted == "stop" else None


def _weight(source: Source, weight: float | None, size: SourceSize, by: str) -> Fraction:
    """Weight by rows."""
    if weight is None:
        return Fraction(limit(source, rows_of(source, size)) or 0)
    return _exact(weight) * size.rows / size.tokens if by == "tokens" else _exact(weight)


def _exact(number: float) -> Fraction:
    """The decimal number that was written."""
    return Fraction(str(number))


def _steps(weights: Sequence[Fraction]) -> tuple[int | None, ...]:
    """Whole numbers in inverse proportion to the weights."""
    inverse = [1 / weight if weight else None for weight in weights]
    common = math.lcm(*(number.denominator for number in inverse if number is not None))
    return tuple(None if number is None else int(number * common) for number in inverse)
