"""Reads files of conversations in pieces of a few hundred rows: JSON Lines, JSON, CSV, Parquet, and the Arrow files of
Hugging Face data set folders. A piece is bytes; a worker parses its rows (see `rows_of`)."""

import contextlib
import csv
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any, Literal

from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.shapes import RowKeys, require_shape
from sftd.trainer.tools.prepare.sources.file_kinds import open_bytes, require_kind
from sftd.trainer.tools.prepare.sources.json_text import has_a_row_a_line, json_lines, json_rows

# Size of a piece. Bounds the memory, and depends only on the file, so that the output does too.
_PIECE_ROWS = 256
_PIECE_BYTES = 1 << 20
# Maximum size of a CSV cell, which may hold a whole chat.
_CELL = 1 << 30


@dataclass(frozen=True)
class ChatSource:
    """A chat file: number of rows (blank lines included), sha256 (hex) of its bytes, and its name on the card."""

    path: Path
    rows: int
    sha256: str
    name: str


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a file. `first`: number of the first row, from 1. `data`: JSON Lines or an Arrow stream. For the
    kind `cells`, each line is a list of CSV cells, and the first line has the column names. `unread`: columns that are not
    in `data`."""

    path: str
    kind: Literal["lines", "objects", "cells", "arrow"]
    first: int
    data: bytes
    unread: tuple[str, ...] = ()


def open_source(path: Path, name: str | None = None) -> ChatSource:
    """Count and hash a file. Raises PrepareError when it is missing or of an unsupported kind."""
    kind = require_kind(path)
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise PrepareError(f"There is no chat file {path}.") from error
    except OSError as error:
        raise PrepareError(f"The chat file {path} cannot be read: {error.strerror}.") from error
    with _named_in_errors(path):
        if kind.format == "parquet":
            rows = _open_parquet(path).metadata.num_rows
        elif kind.format == "arrow":
            rows = sum(batch.num_rows for batch in _arrow_batches(path))
        elif kind.format == "csv":
            rows = sum(1 for _ in _csv_lines(path)) - 1
        else:
            rows = sum(1 for _ in (json_lines if has_a_row_a_line(path) else json_rows)(path))
    return ChatSource(path, max(0, rows), digest, name or path.name)


def pieces(source: ChatSource, keys: RowKeys) -> Iterator[Piece]:
    """The file in pieces. Raises PrepareError when the rest of it cannot be read."""
    path = source.path
    form = require_kind(path).format
    with _named_in_errors(path):
        if form in ("parquet", "arrow"):
            yield from _arrow_pieces(path, form, keys)
        elif form == "csv":
            lines = _csv_lines(path)
            if head := next(lines, None):
                _columns(path, json.loads(head), keys)
                yield from _pieces(path, "cells", lines, head)
        elif has_a_row_a_line(path):
            yield from _pieces(path, "lines", json_lines(path))
        else:
            yield from _pieces(path, "objects", json_rows(path))


def _pieces(
    path: Path, kind: Literal["lines", "objects", "cells"], lines: Iterator[bytes], head: bytes = b""
) -> Iterator[Piece]:
    part: list[bytes] = []
    first, size = 1, 0
    for number, line in enumerate(lines, start=1):
        part.append(line)
        size += len(line)
        if len(part) == _PIECE_ROWS or size >= _PIECE_BYTES:
            yield Piece(str(path), kind, first, head + b"".join(part))
            part, first, size = [], number + 1, 0
    if part:
        yield Piece(str(path), kind, first, head + b"".join(part))


def rows_of(piece: Piece) -> Iterator[tuple[str, Any]]:
    """(place for messages, row) of each row; an unreadable row is a ChatError. Skips blank lines."""
    if piece.kind == "arrow":
        yield from _arrow_rows(piece)
        return
    unit = "line" if piece.kind == "lines" else "row"
    # Not splitlines(): it also splits at characters that are valid inside JSON strings.
    lines = piece.data.split(b"\n")
    names = json.loads(lines.pop(0)) if piece.kind == "cells" else None
    for number, line in enumerate(lines, start=piece.first):
        if not line.strip():
            continue
        place = f"{piece.path}, {unit} {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, too deeply nested
            yield place, ChatError(f"it is not JSON ({error}). Write one JSON object a line, in UTF-8")
            continue
        if names is not None and len(row) != len(names):
            row = ChatError(f"it has {len(row)} cells, but the file has {len(names)} columns. Fix the row")
        elif names is not None:
            row = {name: cell for name, cell in zip(names, row, strict=True) if cell}
        yield place, row


def _csv_lines(path: Path) -> Iterator[bytes]:
    """The rows of a CSV file, column names first, each as a JSON list on one line."""
    csv.field_size_limit(_CELL)
    separator = "\t" if require_kind(path).suffix == ".tsv" else ","
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
        for cells in csv.reader(stream, delimiter=separator, strict=True):
            if cells:
                yield json.dumps(cells).encode() + b"\n"


def _arrow_pieces(path: Path, form: str, keys: RowKeys) -> Iterator[Piece]:
    import pyarrow as pa

    if form == "parquet":
        parquet = _open_parquet(path)
        names = parquet.schema_arrow.names
        columns = _columns(path, names, keys)
        batches = parquet.iter_batches(batch_size=_PIECE_ROWS, columns=columns)
    else:
        names = next(_arrow_batches(path)).schema.names
        columns = _columns(path, names, keys)
        batches = (batch.select(columns) for batch in _arrow_batches(path))
    unread = tuple(name for name in names if name not in columns)
    first = 1
    for whole in batches:
        for start in range(0, whole.num_rows, _PIECE_ROWS):
            batch = whole.slice(start, _PIECE_ROWS)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Piece(str(path), "arrow", first, sink.getvalue().to_pybytes(), unread)
            first += batch.num_rows


def _arrow_rows(piece: Piece) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    from sftd.trainer.tools.prepare.sources.arrow_values import json_value

    with pa.ipc.open_stream(piece.data) as reader:
        table = reader.read_all()
    meant = {field.name: json_value(field.type) for field in table.schema}
    for number, row in enumerate(table.to_pylist(), start=piece.first):
        place = f"{piece.path}, row {number}"
        try:
            yield place, {name: meant[name](value) for name, value in row.items()}
        except (ValueError, RecursionError) as error:
            yield place, ChatError(f"a column of JSON holds text that is not JSON ({error})")


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Raise PrepareError with the file's name when it cannot be read to its end, for example a partial copy."""
    try:
        yield
    except (OSError, ValueError, EOFError, LZMAError, zlib.error, csv.Error) as error:
        raise PrepareError(f"{path} is broken ({error}). Copy or make it again.") from error


def _columns(path: Path, names: Sequence[str], keys: RowKeys) -> list[str]:
    """The columns to read. Raises PrepareError."""
    try:
        require_shape(names, keys)
    except ChatError as error:
        raise PrepareError(f"{path}: {error}.") from error
    read = [name for name in names if keys.reads(name)]
    for name in read:
        if (times := read.count(name)) > 1:
            raise PrepareError(f"{path} has the column {name!r} {times} times. Keep one of them.")
    return read


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file, in the stream or the file format."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            try:
                file = pa.ipc.open_file(source)
            except pa.ArrowInvalid as error:
                raise PrepareError(f"{path} is not an Arrow file ({error}).") from error
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
        yield from reader


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # No read-ahead: it would load whole row groups into memory.
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise PrepareError(f"{path} is not a Parquet file ({error}).") from error
