"""What an attempt printed, line by line: torchrun's own output and that of each rank, also while it is being written.

Of a rank that prints too much, the middle is not kept (`trainer/runtime/output_cap.py`): there its file has a hole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sftd.wire.attempt.directory import AttemptDir

_BLOCK = 1 << 16
# A line without an end is given out in pieces of this size.
_LONGEST = 1 << 20


class Follower:
    """Gives each line of a file once, in order, however often it is asked; a line that is not finished is kept back."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last`: the number of existing lines to begin with; None is all."""
        self._path = path
        self._offset = 0 if last is None else _offset_of_last(path, last)
        self._rest = b""

    def lines(self, *, to_the_end: bool = False) -> Iterator[str]:
        """What was written since the last time; `to_the_end`, also what has no end of a line."""
        try:
            # Unbuffered: looking for data moves the position.
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            while True:
                if (data := _seek_data(file.fileno(), self._offset)) > self._offset:
                    if self._rest:
                        yield self._take_rest()
                    yield f"[{(data - self._offset) / 1e6:,.0f} MB that were printed here are not kept]"
                    self._offset = data
                if not (block := file.read(_BLOCK)):
                    break
                self._offset += len(block)
                *whole, self._rest = (self._rest + block).split(b"\n")
                for line in whole:
                    yield _text(line)
                if len(self._rest) > _LONGEST:
                    yield self._take_rest()
        if to_the_end and self._rest:
            yield self._take_rest()

    def _take_rest(self) -> str:
        line, self._rest = _text(self._rest), b""
        return line


def _seek_data(descriptor: int, offset: int) -> int:
    """Go to the first byte that is kept, at or after `offset`. Returns its offset."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        # Nothing follows it.
        return os.lseek(descriptor, offset, os.SEEK_SET)


def _text(line: bytes) -> str:
    # What was taken out while it was being read is read as zeros. Of a progress bar that paints over itself, what stays
    # on the screen.
    return line.strip(b"\0").rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def _offset_of_last(path: Path, count: int) -> int:
    """Where the last `count` lines of a file begin. Read from the end, so that a long file costs no more."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        end = file.seek(0, os.SEEK_END)
        first = _behind_the_hole(file.fileno(), end)
        if end == 0 or count == 0:
            return end
        # The end of the last line begins no other.
        file.seek(end - 1)
        missing = count + (file.read(1) == b"\n")
        while end > first:
            start = max(first, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start)
            found = block.count(b"\n")
            if found >= missing:
                at = len(block)
                for _ in range(missing):
                    at = block.rindex(b"\n", 0, at)
                return start + at + 1
            missing -= found
            end = start
    return first


def _behind_the_hole(descriptor: int, end: int) -> int:
    """Where what is kept of the end of a file begins; 0 in one that is whole."""
    hole = os.lseek(descriptor, 0, os.SEEK_HOLE) if end else 0
    return _seek_data(descriptor, hole) if hole < end else 0


class Output:
    """Everything that an attempt prints: (rank, line); the rank is None for torchrun's own lines."""

    def __init__(
        self, directory: AttemptDir, ranks: frozenset[int] = frozenset(), last: int | None = None
    ) -> None:
        """`ranks` are the wanted ones, without torchrun; none is everything. `last`: the number of existing lines of each to
        begin with."""
        self._directory = directory
        self._ranks = ranks
        self._followers: dict[Path, Follower] = {}
        self._last = last
        self.has_lines = False

    def lines(self, *, to_the_end: bool = False) -> Iterator[tuple[int | None, str]]:
        """What was printed since the last time. The order is right for each rank; torchrun, which says at the end why,
        comes last."""
        files: list[tuple[int | None, Path]] = [
            (rank, path)
            for rank, path in self._directory.rank_outputs()
            if not self._ranks or rank in self._ranks
        ]
        if not self._ranks:
            files.append((None, self._directory.output_log))
        for rank, path in files:
            follower = self._followers.get(path)
            if follower is None:
                follower = self._followers[path] = Follower(path, self._last)
            for line in follower.lines(to_the_end=to_the_end):
                self.has_lines = True
                yield rank, line
        # What begins from now on is new, all of it.
        self._last = None
