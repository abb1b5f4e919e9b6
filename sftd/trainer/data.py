"""The rows of the Parquet files as samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sftd.trainer.errors import DataError
from sftd.wire.dataset import COLUMNS, IGNORE_INDEX

Ints = npt.NDArray[np.int64]
# Decoded row groups that are kept: random access comes back to them, and memory stays bounded.
_CACHE_BYTES = 256 << 20
_SCAN_ROWS = 4096


@dataclass(frozen=True)
class Sample:
    """One row as it is trained: `tokens` int64 [n], and for each the token to predict (`labels` int64 [n]), which is
    the next one where it is trained and -100 elsewhere."""

    tokens: Ints
    labels: Ints


@dataclass(frozen=True)
class _RowGroup:
    starts: Ints
    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        return int(self.starts.nbytes + self.ids.nbytes + self.labels.nbytes)


class Rows:
    """The usable rows of some Parquet files, read on demand through memory maps; an index is all that stays in RAM.

    lengths: int64 [rows], tokens of each usable row after truncation. numbers: int64 [rows], each one's place among
    all rows of the files. truncated_rows: rows longer than `sequence_length`. dropped_rows: rows without a trained
    label, which are not in the index.
    """

    def __init__(self, paths: list[str], *, sequence_length: int, truncation: str, vocab_size: int) -> None:
        """Scan the files. Raises `DataError` for a file that cannot be read or holds what cannot be trained on."""
        self._limit = sequence_length
        self._keeps_end = truncation == "left"
        self._paths = paths
        self._files = [_open(path) for path in paths]
        self._cache: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()
        self._cached_bytes = 0
        self.truncated_rows = self.dropped_rows = 0
        parts: list[Ints] = []
        number = 0
        for file, parquet in enumerate(self._files):
            for group in range(parquet.num_row_groups):
                offset = 0
                for data in self._slices(file, group):
                    where = f"{paths[file]}, row group {group}, from row {offset}"
                    index = self._scan(data, where, truncation == "error", vocab_size)
                    count = index.shape[1]
                    inside = offset + np.arange(count)
                    place = np.stack(
                        [np.full(count, file), np.full(count, group), inside, number + np.arange(count)]
                    )
                    parts.append(np.concatenate([place, index])[:, index[1] > 0])
                    self.dropped_rows += int((index[1] == 0).sum())
                    offset += count
                    number += count
        table = np.concatenate(parts, axis=1) if parts else np.empty((6, 0), np.int64)
        self._place = table[:3].astype(np.int32)
        self.numbers: Ints = table[3].copy()
        self.lengths: Ints = table[4].copy()

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, row: int) -> Sample:
        """Usable row `row`."""
        file, group, offset = (int(x) for x in self._place[:, row])
        data = self._row_group(file, group)
        start, stop = int(data.starts[offset]), int(data.starts[offset + 1])
        if self._keeps_end:
            start = max(start, stop - self._limit)
        window = slice(start, start + int(self.lengths[row]))
        labels = np.full(self.lengths[row], IGNORE_INDEX, np.int64)
        # The labels in the file stand at their own token; predicting it is the task of the token before.
        labels[:-1] = data.labels[window][1:]
        return Sample(data.ids[window].astype(np.int64), labels)

    def _scan(self, data: _RowGroup, where: str, refuses_long: bool, vocab_size: int) -> Ints:
        """Length after truncation and trained tokens of each row: int64 [2, rows]. Raises `DataError`."""
        sizes = np.diff(data.starts)
        is_trained = data.labels != IGNORE_INDEX
        for name, values in (("input_ids", data.ids), ("labels", data.labels[is_trained])):
            if values.size and (values.min() < 0 or values.max() >= vocab_size):
                raise DataError(f"{where}: {name} holds ids outside the model's vocabulary of {vocab_size}")
        row = np.repeat(np.arange(sizes.size), sizes)
        position = np.arange(data.ids.size) - data.starts[row]
        too_long = sizes > self._limit
        if refuses_long and too_long.any():
            bad = int(too_long.argmax())
            raise DataError(
                f"{where}, row {bad}: {sizes[bad]} tokens are more than data.sequence_length {self._limit}"
            )
        self.truncated_rows += int(too_long.sum())
        first = (np.maximum(sizes - self._limit, 0) if self._keeps_end else np.zeros_like(sizes))[row]
        is_kept = (position >= first) & (position < first + self._limit)
        # Nothing predicts the first token that is kept.
        counts = (
            np.bincount(row, weights=w, minlength=sizes.size)
            for w in (is_kept, is_kept & is_trained & (position > first))
        )
        return np.stack(list(counts)).astype(np.int64)

    def _row_group(self, file: int, group: int) -> _RowGroup:
        key = (file, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        data = self._cache[key] = self._decode(file, group)
        self._cached_bytes += data.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return data

    def _slices(self, file: int, group: int) -> Iterator[_RowGroup]:
        """A row group a few rows at a time: one of millions of rows is never in memory whole while it is scanned."""
        where = f"{self._paths[file]}, row group {group}"
        try:
            for batch in self._files[file].iter_batches(
                _SCAN_ROWS, row_groups=[group], columns=list(COLUMNS)
            ):
                yield _decode(pa.Table.from_batches([batch]), where)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{where} cannot be read: {error}") from error

    def _decode(self, file: int, group: int) -> _RowGroup:
        where = f"{self._paths[file]}, row group {group}"
        try:
            return _decode(self._files[file].read_row_group(group, columns=list(COLUMNS)), where)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{where} cannot be read: {error}") from error


def _decode(table: pa.Table, where: str) -> _RowGroup:
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
    return _RowGroup(starts, ids[is_real].astype(np.int32), labels[is_real].astype(np.int32))


def _open(path: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    if missing := set(COLUMNS) - set(file.schema_arrow.names):
        raise DataError(f"{path} has no column {min(missing)!r}")
    return file
