"""Assigns the samples of a step to micro-batches. Packed: one order for all layouts, cut at sample boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sftd.trainer.data.rows import Ints


@dataclass(frozen=True)
class Planner:
    """Plans micro-batches: packed into at most `tokens` tokens (before rounding up), or padded with `size` samples each.

    `multiple` divides every length, `unit` divides the number of micro-batches. `one_length`: all micro-batches of a step
    have the same length.
    """

    size: int
    tokens: int
    packed: bool
    one_length: bool
    multiple: int
    unit: int

    def plan(self, sample_lengths: Ints) -> tuple[list[Ints], Ints]:
        """The micro-batches for samples of `sample_lengths` (int64 [n], n ≥ 1): the sample indices of each, in order, and
        the padded lengths (int64 [micro-batches]). The last ones may be partly or completely empty."""
        if self.packed:
            order = packed_order(sample_lengths)
            members = [order[piece] for piece in cut(sample_lengths[order], self.tokens, self.unit)]
            sizes = [int(sample_lengths[m].sum()) for m in members]
        else:
            count = -(-sample_lengths.size // (self.size * self.unit)) * self.unit
            samples = np.arange(sample_lengths.size)
            members = [samples[k * self.size : (k + 1) * self.size] for k in range(count)]
            sizes = [int(sample_lengths[m].max(initial=0)) for m in members]
        lengths = -(-np.maximum(sizes, 1) // self.multiple) * self.multiple
        return members, np.full_like(lengths, lengths.max()) if self.one_length else lengths


def packed_order(lengths: Ints) -> Ints:
    """An order of the samples that spreads the tokens evenly: int64 permutation [n].

    Depends on the lengths (int64 [n]) alone. Deals the samples by falling length to two halves as A B B A A B …, so that
    their sums are nearly equal, orders each half in the same way, and concatenates the halves.
    """

    def deal(samples: Ints) -> Ints:
        if samples.size < 3:
            return samples
        place = np.arange(samples.size) % 4
        is_second = (place == 1) | (place == 2)
        return np.concatenate((deal(samples[~is_second]), deal(samples[is_second])))

    return deal(np.argsort(-lengths, kind="stable"))


def cut(lengths: Ints, budget: int, multiple: int) -> list[slice]:
    """Cut samples of `lengths` (int64 [n], in packed order, none above `budget` tokens) into contiguous pieces.

    The number of pieces is the smallest multiple of `multiple` with which no piece exceeds `budget`. Among those cuts,
    this one minimises the largest piece. The last pieces are empty if fewer suffice.
    """
    ends = np.cumsum(lengths)
    count = -(-len(_fill(ends, budget)) // multiple) * multiple
    low, high = int(lengths.max(initial=0)), budget
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ends, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    stops = _fill(ends, low)
    stops += [lengths.size] * (count - len(stops))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _fill(ends: Ints, capacity: int) -> list[int]:
    """End of each piece in a greedy fill with at most `capacity` tokens per piece. `ends`: cumulative lengths."""
    stops: list[int] = []
    while (start := stops[-1] if stops else 0) < ends.size:
        before = ends[start - 1] if start else 0
        stops.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return stops
