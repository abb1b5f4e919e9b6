"""Files of conversations, read in pieces of a few hundred rows: JSON Lines, JSON, Parquet, and the Arrow files of Hugging
Face data set folders. A piece is bytes; whoever gets it reads its rows (see `rows_of`)."""

import contextlib
import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from sftd.trainer.prepare.chat_rows import FIELDS, shape_of
from sftd.trainer.prepare.errors import ChatError, PrepareError

# The size of a piece decides how many rows are in memory at once; it depends on nothing but the file.
_PIECE_ROWS = 256
_PIECE_BYTES = 1 << 20
_BLOCK = 1 << 20
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")


@dataclass(frozen=True)
class ChatSource:
    """A chat file: its rows (blank lines included) and the sha256 (hex) of its bytes."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Some rows of a file in order, the first being number `first` (from 1); `data` is JSON Lines or an Arrow stream."""

    path: str
    kind: Literal["lines", "objects", "arrow"]
    first: int
    data: bytes


def open_source(path: Path) -> ChatSource:
    """Measure a file. Raises PrepareError when it is missing or of another kind than read here."""
    if path.suffix not in SUFFIXES:
        raise PrepareError(
            f"{path} is no chat file: its name must end in .jsonl, .json, .parquet or .arrow, or it is a folder of such."
        )
    digest = hashlib.sha256()
    lines, last = 0, b"\n"
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                lines += block.count(b"\n")
                last = block[-1:]
    except FileNotFoundError as error:
        raise PrepareError(f"There is no chat file {path}.") from error
    except OSError as error:
        raise PrepareError(f"The chat file {path} cannot be read: {error.strerror}.") from error
    if path.suffix == ".parquet":
        rows = _open_parquet(path).metadata.num_rows
    elif path.suffix == ".arrow":
        with _breaks_told(path):
            rows = sum(batch.num_rows for batch in _arrow_batches(path))
    elif _is_array(path):
        rows = sum(1 for _ in _objects(path))
    else:
        rows = lines + (last != b"\n")
    return ChatSource(path, rows, digest.hexdigest())


def pieces(source: ChatSource, messages_key: str | None) -> Iterator[Piece]:
    """The file in pieces. Raises PrepareError when it cannot be read on."""
    path = source.path
    if path.suffix in (".parquet", ".arrow"):
        with _breaks_told(path):
            yield from _arrow_pieces(path, messages_key)
        return
    kind: Literal["lines", "objects"] = "objects" if _is_array(path) else "lines"
    part: list[bytes] = []
    first, size = 1, 0
    with path.open("rb") as stream:
        for number, line in enumerate(_objects(path) if kind == "objects" else stream, start=1):
            part.append(line)
            size += len(line)
            if len(part) == _PIECE_ROWS or size >= _PIECE_BYTES:
                yield Piece(str(path), kind, first, b"".join(part))
                part, first, size = [], number + 1, 0
    if part:
        yield Piece(str(path), kind, first, b"".join(part))


def rows_of(piece: Piece) -> Iterator[tuple[str, Any]]:
    """(place for messages, row) of each row; the row is a ChatError where it cannot be read. Blank lines are skipped."""
    if piece.kind == "arrow":
        import pyarrow as pa

        with pa.ipc.open_stream(piece.data) as reader:
            rows = [row for batch in reader for row in batch.to_pylist()]
        for number, row in enumerate(rows, start=piece.first):
            yield f"{piece.path}, row {number}", row
        return
    unit = "line" if piece.kind == "lines" else "row"
    # Not splitlines(): JSON may hold other characters that it takes for line ends.
    for number, line in enumerate(piece.data.split(b"\n"), start=piece.first):
        if not line.strip():
            continue
        place = f"{piece.path}, {unit} {number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested without end
            yield place, ChatError(f"it is not JSON ({error}). Write one JSON object a line, in UTF-8")


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array of rows, not a row a line."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as stream:
        if stream.read(len(BOM_UTF8)) != BOM_UTF8:
            stream.seek(0)
        while byte := stream.read(1):
            if not byte.isspace():
                return byte == b"["
    return False


def _objects(path: Path) -> Iterator[bytes]:
    """The rows of a JSON array, each as a line, without having the whole file in memory."""
    decoder = json.JSONDecoder()
    rows = 0

    def broken(error: object) -> PrepareError:
        return PrepareError(
            f"{path}, row {rows + 1} is not JSON ({error}). Write an array of objects, or one object a line, in UTF-8."
        )

    def read(stream: TextIO, size: int) -> str:
        try:
            return stream.read(size)
        except UnicodeDecodeError as error:
            raise broken(error.reason) from error

    with path.open(encoding="utf-8-sig") as stream:
        text, position, ended = read(stream, _BLOCK), 0, False
        position = text.index("[") + 1
        while True:
            while position < len(text) and (text[position].isspace() or text[position] == ","):
                position += 1
            if position < len(text) and text[position] == "]":
                if (text[position + 1 :] + read(stream, _BLOCK)).strip():
                    raise broken("something follows the end of the array")
                return
            try:
                value, after = decoder.raw_decode(text, position)
            except RecursionError as error:
                raise broken(error) from error
            except ValueError as error:
                if ended:
                    raise broken(error) from error
                # An object may go on behind what has been read.
                more = read(stream, max(_BLOCK, len(text) - position))
                ended = not more
                text, position = text[position:] + more, 0
                continue
            rows += 1
            yield json.dumps(value).encode() + b"\n"
            position = after


def _arrow_pieces(path: Path, messages_key: str | None) -> Iterator[Piece]:
    import pyarrow as pa

    if path.suffix == ".parquet":
        parquet = _open_parquet(path)
        columns = _columns(path, parquet.schema_arrow.names, messages_key)
        batches = parquet.iter_batches(batch_size=_PIECE_ROWS, columns=columns)
    else:
        batches = (
            batch.select(_columns(path, batch.schema.names, messages_key)) for batch in _arrow_batches(path)
        )
    first = 1
    for whole in batches:
        for start in range(0, whole.num_rows, _PIECE_ROWS):
            batch = whole.slice(start, _PIECE_ROWS)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Piece(str(path), "arrow", first, sink.getvalue().to_pybytes())
            first += batch.num_rows


@contextlib.contextmanager
def _breaks_told(path: Path) -> Iterator[None]:
    """Names the file that pyarrow cannot read on, half a copied one, say."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path} is broken ({error}). Copy or make it again.") from error


def _columns(path: Path, names: list[str], messages_key: str | None) -> list[str]:
    if shape_of(names, messages_key) is None:
        raise PrepareError(
            f"{path} has no column {messages_key or 'messages'!r}; it has {', '.join(names)}. "
            "Name the column that holds the chats."
        )
    read = [name for name in names if name in FIELDS or name == messages_key]
    for name in read:
        if (times := read.count(name)) > 1:
            raise PrepareError(f"{path} has the column {name!r} {times} times. Leave one of them in it.")
    return read


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file, of either of its two formats."""
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
        # Without its read-ahead, which takes whole row groups into memory.
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise PrepareError(f"{path} is not a Parquet file ({error}).") from error
