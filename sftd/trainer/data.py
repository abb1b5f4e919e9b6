"""The rows of the Parquet files as samples: decoded once into plain files, and read from memory maps of those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sftd.trainer.errors import DataError, DataNotDecoded
from sftd.wire.dataset import COLUMNS, IGNORE_INDEX

Ints = npt.NDArray[np.int64]
# Rows decoded at a time: a few hundred MB where all are as long as can be.
_SCAN_ROWS = 512
# In a spool: int32 [tokens, 2], a token's id and its label side by side; int64 [rows, 4], see `Rows`; two counts.
_TOKENS, _INDEX, _COUNTS = "tokens", "index", "counts.json"


@dataclass(frozen=True)
class Sample:
    """One row as it is trained: `tokens` int64 [n], and for each the token to predict (`labels` int64 [n]), which is
    the next one where it is trained and -100 elsewhere."""

    tokens: Ints
    labels: Ints


class Rows:
    """The usable rows of some Parquet files. Reading one costs its own tokens, whatever the files' row groups are, and
    nothing of it stays in RAM.

    lengths: int64 [rows], tokens of each usable row after truncation. trained: int64 [rows], its labels that are trained. numbers: int64 [rows], each one's place among
    all rows of the files. truncated_rows: rows longer than `sequence_length`. dropped_rows: rows without a trained
    label, which are not in the index.
    """

    def __init__(self, spool: Path) -> None:
        """Map what `write_spool` wrote. The files may be unlinked afterwards."""
        self._tokens = _map(spool / _TOKENS, np.int32, 2)
        index = _map(spool / _INDEX, np.int64, 4)
        self.numbers: Ints = index[:, 0]
        self._starts = index[:, 1]
        self.lengths: Ints = index[:, 2]
        self.trained: Ints = index[:, 3]
        self.truncated_rows, self.dropped_rows = json.loads((spool / _COUNTS).read_text())

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, row: int) -> Sample:
        """Usable row `row`."""
        start, length = int(self._starts[row]), int(self.lengths[row])
        pairs = self._tokens[start : start + length].astype(np.int64)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        # The labels in the file stand at their own token; predicting it is the task of the token before.
        labels[:-1] = pairs[1:, 1]
        return Sample(np.ascontiguousarray(pairs[:, 0]), labels)


def write_spool(
    spool: Path,
    paths: list[str],
    *,
    sequence_length: int,
    truncation: str,
    vocab_size: int,
    with_tokens: bool = True,
) -> None:
    """Decode and check the files, a few rows at a time, into the folder `spool`. Without tokens only what `Rows` knows of
    every row is there, not the rows.

    Raises `DataError` for a file that cannot be read or holds what cannot be trained on, `DataNotDecoded` for a full
    disk.
    """
    scan = _Scan(sequence_length, truncation, vocab_size)
    start = number = 0
    try:
        with open(spool / _TOKENS, "wb") as tokens, open(spool / _INDEX, "wb") as index:
            for where, data in _slices(paths):
                lengths, trained, is_kept = scan.look(data, where)
                is_used = trained > 0
                if with_tokens:
                    pairs = np.stack((data.ids[is_kept], data.labels[is_kept]), axis=1)
                    tokens.write(pairs.astype(np.int32).tobytes())
                used = lengths[is_used]
                starts = start + np.cumsum(used) - used
                numbers = number + np.flatnonzero(is_used)
                index.write(np.stack((numbers, starts, used, trained[is_used]), axis=1).tobytes())
                start += int(used.sum())
                number += lengths.size
        (spool / _COUNTS).write_text(json.dumps([scan.truncated, scan.dropped]))
    except OSError as error:
        raise DataNotDecoded(
            f"the decoded rows of {', '.join(paths)} (8 bytes a token) cannot be written to {spool}: {error}"
        ) from error


def _map(path: Path, dtype: npt.DTypeLike, width: int) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty((0, width), dtype)
    return np.asarray(np.memmap(path, dtype, mode="r")).reshape(-1, width)


@dataclass(frozen=True)
class _Slice:
    """A few rows end to end: row i is `ids[starts[i]:starts[i + 1]]`."""

    starts: Ints
    ids: Ints
    labels: Ints


class _Scan:
    """Checks rows, truncates them and counts what is not used."""

    def __init__(self, sequence_length: int, truncation: str, vocab_size: int) -> None:
        self._limit = sequence_length
        self._keeps_end = truncation == "left"
        self._refuses_long = truncation == "error"
        self._vocab_size = vocab_size
        self.truncated = self.dropped = 0

    def look(self, data: _Slice, where: str) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """Each row's length after truncation and its trained labels, and of each token whether it is kept.

        Raises `DataError`.
        """
        sizes = np.diff(data.starts)
        is_trained = data.labels != IGNORE_INDEX
        for name, values in (("input_ids", data.ids), ("labels", data.labels[is_trained])):
            if values.size and (values.min() < 0 or values.max() >= self._vocab_size):
                raise DataError(
                    f"{where}: {name} holds ids outside the model's vocabulary of {self._vocab_size}"
                )
        row = np.repeat(np.arange(sizes.size), sizes)
        position = np.arange(data.ids.size) - data.starts[row]
        too_long = sizes > self._limit
        if self._refuses_long and too_long.any():
            bad = int(too_long.argmax())
            raise DataError(
                f"{where}, row {bad}: {sizes[bad]} tokens are more than data.sequence_length {self._limit}"
            )
        self.truncated += int(too_long.sum())
        first = (np.maximum(sizes - self._limit, 0) if self._keeps_end else np.zeros_like(sizes))[row]
        is_kept = (position >= first) & (position < first + self._limit)
        # Nothing predicts the first token that is kept.
        trained = np.bincount(row[is_kept & is_trained & (position > first)], minlength=sizes.size)
        is_used = trained > 0
        self.dropped += int((~is_used).sum())
        return np.minimum(sizes, self._limit), trained, is_kept & is_used[row]


def _slices(paths: list[str]) -> Iterator[tuple[str, _Slice]]:
    """A few rows at a time, and where they are: a row group of millions of rows is never in memory whole."""
    for path in paths:
        file = _open(path)
        for group in range(file.num_row_groups):
            where, offset = f"{path}, row group {group}", 0
            try:
                for batch in file.iter_batches(_SCAN_ROWS, row_groups=[group], columns=list(COLUMNS)):
                    data = _decode(pa.Table.from_batches([batch]), where)
                    yield f"{where}, from row {offset}", data
                    offset += batch.num_rows
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{where} cannot be read: {error}") from error


def _decode(table: pa.Table, where: str) -> _Slice:
    """Rows of a table without their padding, which is no part of them. Raises `DataError`."""
    columns: list[Any] = [table.column(name).combine_chunks() for name in COLUMNS]
    flat = [column.flatten() for column in columns]
    if any(array.null_count for array in (*columns, *flat)):
        raise DataError(f"{where} holds nulls")
    sizes = [column.value_lengths().to_numpy(zero_copy_only=False) for column in columns]
    if any(not np.array_equal(sizes[0], other) for other in sizes[1:]):
        raise DataError(f"{where}: {', '.join(COLUMNS)} differ in length")
    ids, mask, labels = (array.to_numpy(zero_copy_only=False) for array in flat)
    is_real, row = mask == 1, np.repeat(np.arange(sizes[0].size), sizes[0])
    after_padding = is_real[1:] & ~is_real[:-1] & (row[1:] == row[:-1])
    if after_padding.any():
        bad = int(row[1:][after_padding.argmax()])
        raise DataError(
            f"{where}, row {bad}: attention_mask has a 0 before a 1; only padding on the right is understood"
        )
    # Padding is no part of a row: it neither counts towards sequence_length nor is it what truncation keeps.
    real = np.bincount(row, weights=is_real, minlength=sizes[0].size).astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(real)))
    return _Slice(starts, ids[is_real], labels[is_real])


def _open(path: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    if missing := set(COLUMNS) - set(file.schema_arrow.names):
        raise DataError(f"{path} has no column {min(missing)!r}")
    return file
