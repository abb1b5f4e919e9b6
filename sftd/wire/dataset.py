"""The training data as both processes read it: Parquet with one sample a row.

`input_ids`: list of integers (token ids); `attention_mask`: list of 0/1; `labels`: list of integers, unshifted
(`labels[i]` is `input_ids[i]` where trained, -100 elsewhere). The three lists of a row have one length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sftd.domain.errors import Problem, Refused
from sftd.domain.layout import LENGTH_QUANTILES, DataFacts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

COLUMNS = ("input_ids", "attention_mask", "labels")
IGNORE_INDEX = -100
_SLICE_ROWS = 4096
# Rows without a trained label that are named.
_FIRST_ROWS = 5
_PREPARE = "make the file with `sftd prepare`"


def files_digest(paths: list[str]) -> str:
    """sha256 (hex) over the contents of the files in order, each preceded by its size."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).stat().st_size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def inspect(
    where: str,
    paths: list[str],
    *,
    vocab_size: int,
    sequence_length: int,
    truncation: str,
    stop_ids: Sequence[int] = (),
) -> DataFacts:
    """Read every row of the files and say what is in them. `stop_ids` are the tokens that end an answer.

    `where` is the spec's key that named them. Raises `Refused` with every file's first problem: missing, not
    Parquet, wrong schema, empty, lists of unequal length, nulls, token ids or labels outside the vocabulary.
    """
    import numpy as np

    problems: list[Problem] = []
    rows = tokens = trained = longest = truncated = unusable = stopping = 0
    unusable_rows: list[int] = []
    # How many rows that training sees have how many tokens.
    of_length = np.zeros(sequence_length + 1, np.int64)
    for path in paths:
        try:
            with _open(where, path) as file:
                for first, table in _slices(where, path, file):
                    found = _inspect_slice(
                        where, path, first, table, vocab_size, sequence_length, truncation, stop_ids
                    )
                    is_unusable = found.trained == 0
                    seen = np.minimum(found.lengths, sequence_length)[~is_unusable]
                    of_length += np.bincount(seen, minlength=sequence_length + 1)
                    if len(unusable_rows) < _FIRST_ROWS:
                        unusable_rows += (rows + np.flatnonzero(is_unusable)).tolist()
                    tokens += int(found.lengths.sum())
                    trained += int(found.trained.sum())
                    longest = max(longest, int(found.lengths.max(initial=0)))
                    truncated += int((found.lengths > sequence_length).sum())
                    unusable += int(is_unusable.sum())
                    stopping += found.stopping
                    rows += int(found.lengths.size)
        except Refused as refused:
            problems += refused.problems
    if problems:
        raise Refused(problems)
    sizes = np.arange(sequence_length + 1)
    return DataFacts(
        files=paths,
        digest=files_digest(paths),
        rows=rows,
        tokens=tokens,
        trained_tokens=trained,
        longest=longest,
        truncated=truncated,
        unusable=unusable,
        unusable_rows=tuple(unusable_rows[:_FIRST_ROWS]),
        seen_tokens=int((of_length * sizes).sum()),
        seen_squares=int((of_length * sizes * sizes).sum()),
        lengths=_quantiles(of_length),
        stopping=stopping if stop_ids else None,
    )


def _quantiles(of_length: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """The lengths at `LENGTH_QUANTILES` of the rows in order of their length."""
    import numpy as np

    ends = np.cumsum(of_length)
    if not ends[-1]:
        return ()
    places = (np.array(LENGTH_QUANTILES) * (ends[-1] - 1)).round().astype(np.int64)
    return tuple(np.searchsorted(ends, places, side="right").tolist())


def first_rows(path: str, count: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """`input_ids`, `attention_mask` and `labels` of the first `count` rows of a file that was inspected."""
    with _open("", path) as file:
        for batch in file.iter_batches(count, columns=list(COLUMNS)):
            for row in batch.to_pylist()[:count]:
                yield row["input_ids"], row["attention_mask"], row["labels"]
            return


def _refuse(where: str, path: str, what: str, fix: str = _PREPARE) -> Refused:
    return Refused(Problem(where, f"{path}: {what}", fix))


def _open(where: str, path: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise _refuse(
            where, path, "no such file", "check the path; relative ones start at the folder you submit from"
        )
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise _refuse(where, path, f"is not a Parquet file ({str(error).splitlines()[0]})") from None
    return file


def _slices(where: str, path: str, file: pq.ParquetFile) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, a few rows) after another: a row group may hold millions."""
    import pyarrow as pa

    schema = file.schema_arrow
    for column in COLUMNS:
        if column not in schema.names:
            raise _refuse(
                where, path, f"has no column {column!r}; it has {', '.join(schema.names) or 'none'}"
            )
        if (times := schema.names.count(column)) > 1:
            raise _refuse(where, path, f"has the column {column!r} {times} times")
        kind = schema.field(column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise _refuse(where, path, f"column {column!r} is {kind}, not a list of integers")
    if file.metadata.num_rows == 0:
        raise _refuse(where, path, "has no rows", "give a file with data")
    first = 0
    try:
        for batch in file.iter_batches(_SLICE_ROWS, columns=list(COLUMNS)):
            yield first, pa.Table.from_batches([batch])
            first += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise _refuse(where, path, f"is damaged behind row {first} ({str(error).splitlines()[0]})") from None


class _SliceFacts(NamedTuple):
    """Of a few rows: each one's tokens without padding and its trained labels within reach (int64 [rows]), and how many
    rows train a token that ends an answer."""

    lengths: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]
    stopping: int


def _inspect_slice(
    where: str,
    path: str,
    first_row: int,
    table: pa.Table,
    vocab_size: int,
    sequence_length: int,
    truncation: str,
    stop_ids: Sequence[int],
) -> _SliceFacts:
    import numpy as np
    import pyarrow.compute as pc

    columns = {name: table.column(name).combine_chunks() for name in COLUMNS}
    for name, column in columns.items():
        if column.null_count or column.flatten().null_count:
            raise _refuse(where, path, f"column {name!r} holds nulls")
    lengths = pc.list_value_length(columns["input_ids"]).to_numpy(zero_copy_only=False)
    for name in COLUMNS[1:]:
        other = pc.list_value_length(columns[name]).to_numpy(zero_copy_only=False)
        if (bad := np.flatnonzero(other != lengths)).size:
            row = int(bad[0])
            raise _refuse(
                where, path, f"row {first_row + row} has {lengths[row]} input_ids but {other[row]} {name}"
            )
    ids = columns["input_ids"].flatten().to_numpy(zero_copy_only=False)
    labels = columns["labels"].flatten().to_numpy(zero_copy_only=False)
    mask = columns["attention_mask"].flatten().to_numpy(zero_copy_only=False)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad_id = int(ids.min() if ids.min() < 0 else ids.max())
        fix = "tokenise with the tokenizer of the model that is trained"
        raise _refuse(
            where, path, f"token id {bad_id} is outside the model's vocabulary of {vocab_size}", fix
        )
    is_trained = labels != IGNORE_INDEX
    if is_trained.any() and (labels[is_trained].min() < 0 or labels[is_trained].max() >= vocab_size):
        raise _refuse(
            where,
            path,
            f"a label is neither {IGNORE_INDEX} nor within the model's vocabulary of {vocab_size}",
        )
    if mask.size and not np.isin(mask, (0, 1)).all():
        raise _refuse(where, path, "attention_mask holds values other than 0 and 1")
    # A row's first token is never predicted, so a label there trains nothing.
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    position = np.arange(ids.size) - np.repeat(starts, lengths)
    if ((mask == 1) & (position > 0) & (np.roll(mask, 1) == 0)).any():
        what = "attention_mask has a 0 before a 1: padding may only stand on the right"
        raise _refuse(where, path, what, "leave padding out: sftd pads by itself")
    rows = np.repeat(np.arange(lengths.size), lengths)
    # Padding is no part of a row.
    real = np.bincount(rows, weights=mask, minlength=lengths.size).astype(np.int64)
    cut = np.maximum(real - sequence_length, 0) if truncation == "left" else np.zeros_like(real)
    first = np.repeat(cut, lengths)
    visible = is_trained & (mask == 1) & (position > first) & (position < first + sequence_length)
    per_row = np.bincount(rows, weights=visible, minlength=lengths.size).astype(np.int64)
    stops = visible & np.isin(labels, stop_ids)
    return _SliceFacts(real, per_row, int(np.unique(rows[stops]).size))
