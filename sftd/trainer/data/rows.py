"""The rows of the Parquet files as samples: decoded once into plain files, then read through memory maps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sftd.domain.data.rows import IGNORE_INDEX, targets
from sftd.trainer.errors import DataError, DataNotDecoded
from sftd.wire.data.columns import UnusableFile
from sftd.wire.data.rows import DataFile, Slice

Ints = npt.NDArray[np.int64]
# Files of a spool: int32 [tokens, 2], id and label of each token; int64 [rows, 4], see `Rows`; counts. If a trained token has
# a weight other than 1: float32 [tokens], the weights, 0 for 1; float64 [rows], the sums of those of trained tokens.
_TOKENS, _INDEX, _COUNTS = "tokens", "index", "counts.json"
_WEIGHTS, _SUMS = "weights", "sums"


@dataclass(frozen=True)
class Sample:
    """One row: `tokens` int64 [n] and `labels` int64 [n], which is the next token where that is trained, -100 elsewhere.
    `keys`: int64 [n], those of `token_keys` where a step has dropout. `weights`: float32 [n], those of the labels; None if all
    are 1. `source`: the index of the row's source."""

    tokens: Ints
    labels: Ints
    keys: Ints | None = None
    weights: npt.NDArray[np.float32] | None = None
    source: int = 0


class Rows:
    """The usable rows of some Parquet files. A read touches the tokens of its row only, and nothing stays in RAM.

    lengths: int64 [rows], tokens of each usable row after truncation. trained: int64 [rows], number of its trained
    labels. weights: float64 [rows], Σ of their weights (`trained` if all are 1). sources: int64 [rows], the index of its source.
    numbers: int64 [rows], its index among all rows of the files. truncated_rows: number of rows longer than
    `sequence_length`. dropped_rows: number of rows without a trained label; they are not in the index. file_ends: number of
    usable rows up to the end of each file.
    """

    def __init__(self, spool: Path, sources: Sequence[int] = ()) -> None:
        """Map the files of `write_spool`. They may be unlinked afterwards. `sources`: the index of each file's source."""
        self._tokens = _map(spool / _TOKENS, np.int32, 2)
        index = _map(spool / _INDEX, np.int64, 4)
        self.numbers: Ints = index[:, 0]
        self._starts = index[:, 1]
        self.lengths: Ints = index[:, 2]
        self.trained: Ints = index[:, 3]
        has_weights = (spool / _WEIGHTS).exists()
        self._weights = _map(spool / _WEIGHTS, np.float32, 1)[:, 0] if has_weights else None
        self.weights = _map(spool / _SUMS, np.float64, 1)[:, 0] if has_weights else self.trained
        self.truncated_rows, self.dropped_rows, ends = json.loads((spool / _COUNTS).read_text())
        self.file_ends: list[int] = ends
        self.sources: Ints = np.repeat(np.array(sources or [0] * len(ends), np.int64), np.diff([0, *ends]))

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, row: int) -> Sample:
        """Usable row `row`."""
        start, length = int(self._starts[row]), int(self.lengths[row])
        pairs = self._tokens[start : start + length].astype(np.int64)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        following = targets(pairs[:, 1])
        labels[: following.size] = following
        weights = None
        if self._weights is not None:
            weights = np.ones(length, np.float32)
            following = targets(self._weights[start : start + length])
            weights[: following.size] = np.where(following == 0, 1, following)
        return Sample(
            np.ascontiguousarray(pairs[:, 0]), labels, weights=weights, source=int(self.sources[row])
        )


def write_spool(
    spool: Path,
    paths: list[str],
    *,
    sequence_length: int,
    truncation: str,
    vocab_size: int,
    with_tokens: bool = True,
) -> None:
    """Check the files and decode them into the folder `spool`, a few rows at a time. Without `with_tokens`, only the index
    and the counts are written.

    Raises `DataError` for a file with unreadable or unusable contents, `DataNotDecoded` if the spool cannot be written.
    """
    truncated = dropped = start = number = 0
    usable = dict.fromkeys(range(len(paths)), 0)
    try:
        with (
            open(spool / _TOKENS, "wb") as tokens,
            open(spool / _INDEX, "wb") as index,
            open(spool / _WEIGHTS, "wb") as weights,
            open(spool / _SUMS, "wb") as sums,
        ):
            for file, rows in _slices(paths, vocab_size):
                if truncation == "error":
                    _refuse_long(paths[file], rows, sequence_length)
                begins, ends = rows.kept(sequence_length, truncation)
                trained = rows.count(rows.labels != IGNORE_INDEX, begins, ends)
                is_used, used = trained > 0, ends - begins
                if with_tokens:
                    is_kept = _within(rows, begins[is_used], ends[is_used])
                    pairs = np.stack((rows.ids[is_kept], rows.labels[is_kept]), axis=1)
                    tokens.write(pairs.astype(np.int32).tobytes())
                    if rows.weights is not None:
                        # The holes of the file stand for 1.
                        weights.seek(start * 4)
                        weights.write(rows.weights[is_kept].tobytes())
                truncated += int((used < rows.lengths).sum())
                dropped += int((~is_used).sum())
                usable[file] += int(is_used.sum())
                numbers = number + np.flatnonzero(is_used)
                number += used.size
                used = used[is_used]
                starts = start + np.cumsum(used) - used
                index.write(np.stack((numbers, starts, used, trained[is_used]), axis=1).tobytes())
                start += int(used.sum())
                sums.write(rows.sum_of_weights(begins, ends)[is_used].tobytes())
            is_weighted = weights.tell() > 0
            weights.truncate(start * 4)
        if not is_weighted:
            (spool / _WEIGHTS).unlink()
        counts = [truncated, dropped, list(itertools.accumulate(usable.values()))]
        (spool / _COUNTS).write_text(json.dumps(counts))
    except OSError as error:
        raise DataNotDecoded(
            f"the decoded rows of {', '.join(paths)} (8 bytes per token) cannot be written to {spool}: {error}"
        ) from error


def _map(path: Path, dtype: npt.DTypeLike, width: int) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty((0, width), dtype)
    return np.asarray(np.memmap(path, dtype, mode="r")).reshape(-1, width)


def _slices(paths: list[str], vocab_size: int) -> Iterator[tuple[int, Slice]]:
    """The index of each slice's file, and the slice."""
    for number, path in enumerate(paths):
        try:
            with DataFile(path, judges=False) as file:
                for rows in file.slices(vocab_size):
                    yield number, rows
        except UnusableFile as error:
            raise DataError(f"{path}: {error.what}. To fix it, {error.fix}") from error


def _refuse_long(path: str, rows: Slice, sequence_length: int) -> None:
    if (too_long := np.flatnonzero(rows.lengths > sequence_length)).size:
        bad = int(too_long[0])
        raise DataError(
            f"{path}: row {rows.first + bad} has {rows.lengths[bad]} tokens, more than data.sequence_length {sequence_length}"
        )


def _within(rows: Slice, begins: Ints, ends: Ints) -> npt.NDArray[np.bool_]:
    """Mask (bool [tokens]) of the tokens in the given ranges, which do not overlap."""
    edges = np.zeros(rows.ids.size + 1, np.int8)
    edges[begins] += 1
    edges[ends] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)
