"""Writes Parquet files: rows of token ids and labels, in row groups of a fixed size."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sftd.domain.data.rows import IGNORE_INDEX, targets
from sftd.trainer.checkpoint.folder_swap import fsync_file
from sftd.trainer.tools.prepare.tokenize_pieces import Row
from sftd.wire.attempt.directory import fsync_dir
from sftd.wire.data.chat_template import METADATA_KEY

_COLUMNS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
    ]
)
# A further column of files with weights other than 0 and 1: of each token's loss, 0 where it is not trained.
_WEIGHTS = pa.field("loss_weights", pa.list_(pa.float32()))
_ROW_GROUP_ROWS = 1000
# Upper bounds of the length classes in the card.
LENGTHS = tuple(2**n for n in range(4, 22))


class RowFile:
    """A Parquet file, written beside its final name. `publish` renames it."""

    def __init__(self, path: Path, metadata: bytes) -> None:
        self.path = path
        self.rows = self.tokens = self.trained_tokens = self.longest = 0
        self.truncated = self.cut_tokens = self.cut_trained_tokens = self.weighted = 0
        self._lengths = [0] * (len(LENGTHS) + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(path.name + ".partial")
        self._schema = _COLUMNS.with_metadata({METADATA_KEY: metadata})
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        self._pending: list[Row] = []

    def append(self, row: Row) -> None:
        """Write a row."""
        length = len(row.input_ids)
        self.rows += 1
        self.tokens += length
        self.trained_tokens += int((targets(row.labels) != IGNORE_INDEX).sum())
        self.longest = max(self.longest, length)
        self.truncated += row.cut > 0
        self.cut_tokens += row.cut
        self.cut_trained_tokens += row.cut_trained
        self.weighted += row.weights is not None
        self._lengths[int(np.searchsorted(LENGTHS, length))] += 1
        self._pending.append(row)
        if len(self._pending) == _ROW_GROUP_ROWS:
            self._write_row_group()

    def lengths(self) -> dict[str, int]:
        """Number of rows by length class: the smallest power of two that is not less → count."""
        names = [*map(str, LENGTHS), "more"]
        return {name: count for name, count in zip(names, self._lengths, strict=True) if count}

    def close(self) -> None:
        """Write the pending rows and close the file."""
        if self._pending and self._writer.is_open:
            self._write_row_group()
        self._writer.close()

    def publish(self) -> dict[str, Any]:
        """Rename the closed file and return its fields of the `done` event."""
        with self._partial.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        fsync_file(self._partial)
        self._partial.replace(self.path)
        fsync_dir(self.path.parent)
        return {
            "path": str(self.path.resolve()),
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "max_length": self.longest,
            "sha256": sha256,
        }

    def discard(self) -> None:
        """Remove the unpublished file."""
        try:
            self._writer.close()
        finally:  # close writes, and the disk may be full
            self._partial.unlink(missing_ok=True)

    def _write_row_group(self) -> None:
        rows, self._pending = self._pending, []
        if self.weighted and _WEIGHTS.name not in self._schema.names:
            self._add_weights()
        ends = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32)
        labels = np.concatenate([row.labels for row in rows])
        values = [np.concatenate([row.input_ids for row in rows]), np.ones(ends[-1], np.int8), labels]
        if _WEIGHTS.name in self._schema.names:
            given = [np.ones(len(r.labels), np.float32) if r.weights is None else r.weights for r in rows]
            values.append(np.where(labels == IGNORE_INDEX, np.float32(0), np.concatenate(given)))
        arrays = [pa.ListArray.from_arrays(pa.array(ends), pa.array(column)) for column in values]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def _add_weights(self) -> None:
        """Write the file again with a column of weights, 1 for the trained tokens so far."""
        self._writer.close()
        written = self._partial.with_name(self._partial.name + ".unweighted")
        self._partial.replace(written)
        self._schema = self._schema.append(_WEIGHTS)
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        try:
            with pq.ParquetFile(written) as file:
                for number in range(file.num_row_groups):
                    table = file.read_row_group(number).combine_chunks()
                    labels = table["labels"].chunk(0)
                    ones = (labels.values.to_numpy() != IGNORE_INDEX).astype(np.float32)
                    weights = pa.ListArray.from_arrays(labels.offsets, pa.array(ones))
                    arrays = [*(column.chunk(0) for column in table.columns), weights]
                    self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        finally:
            written.unlink()


class Spool:
    """Rows on the disk until the validation rows are chosen."""

    _SCHEMA = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("weights", pa.list_(pa.float32())),
            *((name, pa.binary(8)) for name in ("key", "loose", "prompt")),
            ("place", pa.string()),
            ("cut", pa.int64()),
            ("cut_trained", pa.int64()),
        ]
    )

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._SCHEMA)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows."""
        if not rows:
            return
        columns = [[getattr(row, field.name) for row in rows] for field in self._SCHEMA]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._SCHEMA))

    def rows(self) -> Iterator[Row]:
        """All rows in order. No rows can be added afterwards."""
        self._close()
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                columns = {name: batch.column(name) for name in batch.schema.names}
                for n in range(batch.num_rows):
                    cells = {name: column[n] for name, column in columns.items()}
                    lists = {name: cells.pop(name).values for name in ("input_ids", "labels", "weights")}
                    fields: dict[str, Any] = {name: cell.as_py() for name, cell in cells.items()}
                    fields |= {name: v if v is None else v.to_numpy() for name, v in lists.items()}
                    yield Row(**fields)

    def discard(self) -> None:
        """Remove the file."""
        self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()
