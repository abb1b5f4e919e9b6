"""The output of an attempt, line by line: of torchrun and of each rank, also while they write it.

If a rank prints too much, the middle is dropped (`trainer/runtime/output_cap.py`): its file then has a hole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sftd.wire.attempt.directory import AttemptDir

_BLOCK = 1 << 16
# A longer line is returned in pieces.
_LONGEST = 1 << 20


class Follower:
    """Returns each line of a growing file once, in order. An unfinished line waits until it is complete."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last`: the number of existing lines to return; None is all."""
        self._path = path
        self._offset = 0 if last is None else _offset_of_last(path, last)
        self._rest = b""

    def lines(self, *, to_the_end: bool = False) -> Iterator[str]:
        """The lines written since the last call. With `to_the_end`, also an unfinished last line."""
        try:
            # Unbuffered, because `lseek` bypasses a buffer.
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            while True:
                if (data := _seek_data(file.fileno(), self._offset)) > self._offset:
                    if self._rest:
                        yield self._take_rest()
                    yield f"[{(data - self._offset) / 1e6:,.0f} MB of output omitted]"
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
    """Seek to the first byte at or after `offset` that is not in a hole. Returns its offset."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        # No data follows.
        return os.lseek(descriptor, offset, os.SEEK_SET)


def _text(line: bytes) -> str:
    # A hole that was made during the read reads as zeros. A progress bar overwrites itself: keep its last state.
    return line.strip(b"\0").rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def _offset_of_last(path: Path, count: int) -> int:
    """Offset of the last `count` lines of a file. Reads from the end, so that the cost does not depend on the file's size."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        end = file.seek(0, os.SEEK_END)
        first = _end_of_hole(file.fileno(), end)
        if end == 0 or count == 0:
            return end
        # No line follows a newline at the end of the file.
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


def _end_of_hole(descriptor: int, end: int) -> int:
    """Offset of the data after the hole of a file; 0 if it has no hole."""
    hole = os.lseek(descriptor, 0, os.SEEK_HOLE) if end else 0
    return _seek_data(descriptor, hole) if hole < end else 0


class Output:
    """The output of an attempt: (rank, line); the rank is None for torchrun's own lines."""

    def __init__(
        self, directory: AttemptDir, ranks: frozenset[int] = frozenset(), last: int | None = None
    ) -> None:
        """`ranks` limits the output to these ranks, without torchrun; empty is everything. `last`: the number of existing lines
        of each file to return."""
        self._directory = directory
        self._ranks = ranks
        self._followers: dict[Path, Follower] = {}
        self._last = last
        self.has_lines = False

    def lines(self, *, to_the_end: bool = False) -> Iterator[tuple[int | None, str]]:
        """The lines printed since the last call, in order for each rank. torchrun is last: its summary of the failure comes
        at the end."""
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
        # Files that appear after the first call are returned whole.
        self._last = None
