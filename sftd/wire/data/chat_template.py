"""The chat template that data files were rendered with, as `sftd prepare` wrote it into them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sftd.domain.data.chat_template import ChatTemplate

# The key of the Parquet's metadata that `sftd prepare` writes, and the largest value that is read.
METADATA_KEY, _LARGEST = b"sftd", 4 << 20


class _Metadata(msgspec.Struct, frozen=True):
    chat_template: ChatTemplate | None = None
    chat_template_sha256: str = ""


def of_files(paths: Sequence[str]) -> ChatTemplate | None:
    """The template of the first file that names one; None where another tool made the files. The files are Parquet."""
    return next((found.chat_template for path in paths if (found := _read(path)).chat_template), None)


def different(paths: Sequence[str]) -> tuple[str, str] | None:
    """The first file and another one that were rendered in different ways; None where all are alike. The files are
    Parquet."""
    known = [(path, found) for path in paths if (found := _read(path)).chat_template is not None]
    return next(((known[0][0], path) for path, found in known if found != known[0][1]), None)


def _read(path: str) -> _Metadata:
    import pyarrow.parquet as pq

    written = (pq.read_schema(path, memory_map=True).metadata or {}).get(METADATA_KEY, b"")
    if not written or len(written) > _LARGEST:
        return _Metadata()
    try:
        return msgspec.json.decode(written, type=_Metadata)
    except (msgspec.MsgspecError, RecursionError):
        return _Metadata()  # the metadata of another tool
