"""Kinds of chat files by their names: format and compression."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sftd.trainer.chat.errors import PrepareError

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
READ = ".jsonl, .json, .csv, .tsv (also with .gz, .bz2, .xz, .zst, .lz4), .parquet, .arrow"


def _open_arrows(path: Path, _: str) -> io.BufferedReader:
    """A file in a compression that Arrow knows and Python's library lacks."""
    import pyarrow as pa

    codec = "zstd" if path.suffix.lower() == ".zst" else "lz4"
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return io.BufferedReader(stream)


_COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_arrows,
    ".lz4": _open_arrows,
}


@dataclass(frozen=True)
class FileKind:
    """`format`: json, csv, parquet or arrow. `suffix`: the one of that format. `unreadable`: how to make the file readable,
    if it is not."""

    format: str
    suffix: str
    unreadable: str = ""


def kind_of(path: Path) -> FileKind | None:
    """The kind of a chat file by its suffix, in any case; None for another name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (*_COMPRESSIONS, ".zip") else ""
    found = suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None
    if found is None:
        # An archive that may hold chat files.
        return FileKind("", ".zip", "unpack it") if packed == ".zip" else None
    form = _FORMATS[found]
    if packed == ".zip" or (packed and form in ("parquet", "arrow")):
        return FileKind(form, found, "unpack it" if packed == ".zip" else "decompress it")
    return FileKind(form, found)


def require_kind(path: Path) -> FileKind:
    """The kind of a readable chat file. Raises PrepareError for any other file."""
    kind = kind_of(path)
    if kind is None:
        raise PrepareError(
            f"{path} is not a chat file: its name must end in one of {READ}, or it is a folder of such files."
        )
    if kind.unreadable:
        raise PrepareError(f"{path} cannot be read directly: {kind.unreadable}.")
    return kind


def open_bytes(path: Path) -> IO[bytes]:
    """The file's contents, decompressed by its name."""
    opener = _COMPRESSIONS.get(path.suffix.lower(), open)
    stream: IO[bytes] = opener(path, "rb")
    return stream
