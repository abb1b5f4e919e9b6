"""The chat template with which data files were rendered. `sftd prepare` stores it in their metadata."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sftd.domain.data.chat_template import ChatTemplate

# The key of the Parquet metadata, and the largest value that is read, in bytes.
METADATA_KEY, _LARGEST = b"sftd", 4 << 20


class _Metadata(msgspec.Struct, frozen=True):
    chat_template: ChatTemplate | None = None
    chat_template_sha256: str = ""


def of_files(paths: Sequence[str]) -> ChatTemplate | None:
    """The template of the first Parquet file that has one; None if other tools made the files."""
    return next((found.chat_template for path in paths if (found := _read(path)).chat_template), None)


def different(paths: Sequence[str]) -> tuple[str, str] | None:
    """The first Parquet file with a template, and the first that was rendered differently; None if all are equal."""
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
