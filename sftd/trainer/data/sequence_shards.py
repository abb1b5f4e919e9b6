"""Context parallelism: a rank's part of every sequence, and the keys that its queries see."""

from __future__ import annotations

from bisect import bisect_right


def spans(length: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """The tokens [start, stop) that context-parallel rank `rank` of `ranks` computes.

    Of 2 · ranks equal chunks, a rank has one from the front and its mirror image from the back. A token attends to all
    previous tokens, so each such pair costs the same. With several ranks, `length` is a multiple of 2 · ranks.
    """
    if ranks == 1:
        return [(0, length)]
    size = length // (2 * ranks)
    return [(c * size, (c + 1) * size) for c in (rank, 2 * ranks - 1 - rank)]


def cut_segments(start: int, stop: int, ends: list[int]) -> tuple[int, list[int], list[int]]:
    """The segments of tokens [start, stop), given the `ends` (with a leading 0) of all segments.

    Returns the first token that their queries see, the ends of the segments' queries relative to `start`, and the ends of
    their keys relative to that first token, both with a leading 0. A segment's queries are the last of its keys.
    """
    inner = bisect_right(ends, start)
    first = ends[inner - 1]
    outer = [min(end, stop) for end in ends[inner : bisect_right(ends, stop - 1) + 1]]
    return first, [0, *(end - start for end in outer)], [0, *(end - first for end in outer)]
