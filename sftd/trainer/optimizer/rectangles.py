"""A range of a tensor's elements as rectangles."""

from __future__ import annotations

import math
from collections.abc import Iterator


def rectangles(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the row-major elements [`start`, `end`) into rectangles. Yields (offset, shape) of each, in order."""
    if len(shape) <= 1:
        if start < end:
            yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    head, tail = -(-start // row), end // row
    if start < min(head * row, end):
        above = head - 1
        for offset, size in rectangles(shape[1:], start - above * row, min(end - above * row, row)):
            yield (above, *offset), (1, *size)
    if head < tail:
        yield (head, *(0 for _ in shape[1:])), (tail - head, *shape[1:])
    if tail >= head and tail * row < end:
        for offset, size in rectangles(shape[1:], 0, end - tail * row):
            yield (tail, *offset), (1, *size)
