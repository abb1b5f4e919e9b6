"""The rows of a training file: Parquet with one sample per row.

`input_ids`: list of integers (token ids). `labels`: list of integers, unshifted (`labels[i]` is `input_ids[i]` where
trained, -100 elsewhere). `attention_mask`: list of 0/1 or booleans, 0 only on padding at the right end, all ones when the
column is missing. The lists of a row have the same length. `weight` and `loss_weights`: see `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftd.domain.data import rows as data_rows
from sftd.domain.data.rows import IGNORE_INDEX
from sftd.wire.data import columns as data_columns
from sftd.wire.data.columns import LABELS, Lists, UnusableFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

    Ints = npt.NDArray[np.int64]

_IDS, _MASK = "input_ids", "attention_mask"
# Rows and tokens that are decoded at a time. Both limit memory: a Parquet file of 15 KB can contain 10^8 tokens.
_SLICE_ROWS, _SLICE_TOKENS = 4096, 1 << 20
# The share of trained labels that may differ from the token at their position; a larger share indicates a mistake.
_STRAY = 0.01


@dataclass(frozen=True)
class Slice:
    """Some rows of a file, concatenated without padding: row i is `ids[starts[i]:starts[i + 1]]`.

    first: number of the first row in its file. starts: int64 [rows + 1]. ids, labels: integers [tokens]; a label of weight 0 is
    -100. weights: float32 [tokens], those of the labels; None if those of all trained labels are 1.
    """

    first: int
    starts: Ints
    ids: npt.NDArray[np.integer[Any]]
    labels: npt.NDArray[np.integer[Any]]
    weights: npt.NDArray[np.float32] | None = None

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, int64 [rows]."""
        lengths: Ints = self.starts[1:] - self.starts[:-1]
        return lengths

    def kept(self, limit: int, truncation: str) -> tuple[Ints, Ints]:
        """The tokens of each row that training sees: (begins, ends), int64 [rows] each, indices into `ids`."""
        return data_rows.kept(self.starts[:-1], self.starts[1:], limit, truncation)

    def count(self, flags: npt.NDArray[np.bool_], begins: Ints, ends: Ints) -> Ints:
        """The number of predicted tokens of each row whose flag (bool [tokens]) is set, int64 [rows]."""
        import numpy as np

        places = np.flatnonzero(flags)
        begins, ends = data_rows.predicted(begins, ends)
        return np.asarray(np.searchsorted(places, ends) - np.searchsorted(places, begins))

    def sum_of_weights(self, begins: Ints, ends: Ints) -> npt.NDArray[np.float64]:
        """Σ of the weights of each row's predicted and trained tokens, float64 [rows]."""
        import numpy as np

        places = np.flatnonzero(self.labels != IGNORE_INDEX)
        firsts, ends = data_rows.predicted(begins, ends)
        rows = np.searchsorted(firsts, places, side="right") - 1
        is_kept = (rows >= 0) & (places < ends[rows])
        weights = None if self.weights is None else self.weights[places[is_kept]]
        return np.bincount(rows[is_kept], weights, firsts.size).astype(np.float64)


class DataFile:
    """An open data file. `rows` is the number of rows in its metadata; `unused` are columns that sftd does not recognise.

    With `judges`, as at submit, labels and the columns of other tools are checked. A running run does not check them again.
    Raises `UnusableFile` for a file that is missing, not Parquet, without rows, or of another schema.
    """

    def __init__(self, path: str, *, judges: bool = True) -> None:
        self._judges = judges
        self._file = _open(path)
        self.rows = self._file.metadata.num_rows
        schema = self._file.schema_arrow
        self._columns = data_columns.read_columns(schema, others=judges)
        self.unused = data_columns.unused(schema)
        self.trained = self.stray = self._ahead = 0
        if not self.rows:
            raise UnusableFile("has no rows", "give a file with data")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def slices(self, vocab_size: int, row: int = 0) -> Iterator[Slice]:
        """The checked rows in slices, from the row group of `row` on. Raises `UnusableFile`; for labels that differ from their
        own token, only at the end."""
        import pyarrow as pa

        first = 0
        try:
            for group in range(self._file.num_row_groups):
                if first + (skipped := self._file.metadata.row_group(group).num_rows) <= row:
                    first += skipped
                    continue
                size = _batch_rows(self._file, group)
                for batch in self._file.iter_batches(size, row_groups=[group], columns=self._columns):
                    for start, part in _bounded(batch, first):
                        rows = _decode(part, start, vocab_size)
                        if self._judges:
                            self._compare(rows)
                        yield rows
                    first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UnusableFile(f"is damaged after row {first} ({str(error).splitlines()[0]})") from None
        self._judge_labels()

    def _compare(self, rows: Slice) -> None:
        """Count labels that differ from their own token, and among them those that equal the next token."""
        trained = rows.labels != IGNORE_INDEX
        stray = trained & (rows.labels != rows.ids)
        self.trained += int(trained.sum())
        if stray.any():
            self.stray += int(stray.sum())
            self._ahead += int((stray[:-1] & (rows.labels[:-1] == rows.ids[1:])).sum())

    def _judge_labels(self) -> None:
        if self.stray <= self.trained * _STRAY:
            return
        share = f"{self.stray:,} of {self.trained:,} trained labels"
        if self._ahead > self.stray / 2:
            raise UnusableFile(
                f"{share} equal the next token: the labels are shifted by one, and sftd shifts them itself",
                "write labels[i] = input_ids[i] where trained, -100 elsewhere",
            )
        raise UnusableFile(
            f"{share} differ from their own token: labels[i] must be input_ids[i] where trained, -100 elsewhere"
        )


def read_row(path: str, number: int, vocab_size: int = 2**31) -> Slice:
    """One row of a file (counted from 0), without its padding. Raises `UnusableFile` and `IndexError`."""
    import numpy as np

    with DataFile(path, judges=False) as file:
        for rows in file.slices(vocab_size, number):
            if number < rows.first + rows.lengths.size:
                start, end = rows.starts[number - rows.first : number - rows.first + 2]
                starts = np.array([0, end - start])
                return Slice(number, starts, rows.ids[start:end], rows.labels[start:end])
    raise IndexError(f"{path} has no row {number}")


def _open(path: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise UnusableFile(
            "no such file", "check the path; relative ones start at the folder you submit from"
        )
    try:
        # Read-ahead would load whole row groups into memory.
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UnusableFile(f"is not a Parquet file ({str(error).splitlines()[0]})") from None


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """Number of rows of a row group to decode at a time, from the average length in its metadata."""
    metadata = file.metadata.row_group(group)
    tokens = max(
        metadata.column(number).num_values
        for number in range(metadata.num_columns)
        if metadata.column(number).path_in_schema.partition(".")[0] == _IDS
    )
    average = max(1, tokens // max(1, metadata.num_rows))
    return max(1, min(_SLICE_ROWS, int(_SLICE_TOKENS // average)))


def _bounded(batch: pa.RecordBatch, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, part) of a batch, split into parts of at most `_SLICE_TOKENS` tokens or a single longer row. Row
    lengths may differ much from their average."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = pc.list_value_length(batch.column(_IDS)).fill_null(0)
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _SLICE_TOKENS, side="right")))
        yield first + start, batch.slice(start, end - start)
        start = end


def _decode(batch: pa.RecordBatch, first: int, vocab_size: int) -> Slice:
    import numpy as np

    columns = {name: Lists.of(name, batch.column(name)) for name in batch.schema.names}
    ids = columns.pop(_IDS)
    for name, other in columns.items():
        if name in (LABELS, _MASK) and (bad := np.flatnonzero(other.lengths != ids.lengths)).size:
            row = int(bad[0])
            raise UnusableFile(
                f"row {first + row} has {ids.lengths[row]} {_IDS} but {other.lengths[row]} {name}"
            )
    labels, mask = columns.pop(LABELS).values, columns.pop(_MASK, None)
    starts = np.concatenate(([0], np.cumsum(ids.lengths, dtype=np.int64)))
    _check_ids(ids.values, labels, vocab_size)
    real = np.ones(ids.values.size, np.bool_) if mask is None else _real(mask.values, starts, first)
    trained = real & (labels != IGNORE_INDEX)
    weights = data_columns.take_weights(columns, starts, trained, first)
    data_columns.check_columns(columns, starts, real, trained, first)
    if weights is not None:
        labels = np.where(weights == 0, IGNORE_INDEX, labels)
        if (weights[labels != IGNORE_INDEX] == 1).all():
            weights = None
    if real.all():
        return Slice(first, starts, ids.values, labels, weights)
    sums = np.concatenate(([0], np.cumsum(real)))
    kept = None if weights is None else weights[real]
    return Slice(first, sums[starts], ids.values[real], labels[real], kept)


def _check_ids(ids: npt.NDArray[Any], labels: npt.NDArray[Any], vocab_size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise UnusableFile(
            f"token id {bad} is outside the model's vocabulary of {vocab_size}",
            "tokenise with the tokenizer of the model that is trained",
        )
    if labels.size and (labels.max() >= vocab_size or ((labels < 0) & (labels != IGNORE_INDEX)).any()):
        raise UnusableFile(
            f"a label is neither {IGNORE_INDEX} nor within the model's vocabulary of {vocab_size}"
        )


def _real(mask: npt.NDArray[Any], starts: Ints, first: int) -> npt.NDArray[np.bool_]:
    """Which tokens (bool [tokens]) are not padding."""
    import numpy as np

    real: npt.NDArray[np.bool_] = mask.astype(np.bool_)
    if (mask != real).any():
        raise UnusableFile(f"{_MASK} holds values other than 0 and 1")
    begins = np.zeros(mask.size + 1, np.bool_)
    begins[starts] = True
    if (late := np.flatnonzero(real[1:] & ~real[:-1] & ~begins[1:-1])).size:
        row = first + int(np.searchsorted(starts, late[0], side="right")) - 1
        raise UnusableFile(
            f"row {row}: {_MASK} has a 0 before a 1: padding may only be on the right",
            "remove the padding: sftd pads by itself",
        )
    return real
