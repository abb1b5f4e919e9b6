"""The chat template that data files were rendered with, as `sftd prepare` wrote it into them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.errors import Problem

# The key of the Parquet's metadata that `sftd prepare` writes, and the largest value that is read.
METADATA_KEY, _LARGEST = b"sftd", 4 << 20


class _Metadata(msgspec.Struct, frozen=True):
    chat_template: ChatTemplate | None = None
    chat_template_sha256: str = ""


def of_files(paths: Sequence[str]) -> ChatTemplate | None:
    """The template of the first file that names one; None where another tool made the files. The files are Parquet."""
    return next((found.chat_template for path in paths if (found := _read(path)).chat_template), None)


def warnings(where: str, paths: Sequence[str]) -> list[Problem]:
    """What to say of files that were rendered in different ways. `where` is the spec's key that named them."""
    first = None
    for path in paths:
        found = _read(path)
        if found.chat_template is None:
            continue
        if first is not None and found != first[1]:
            return [
                Problem(
                    where,
                    f"{first[0]} and {path} were rendered with different chat templates, dates or template arguments",
                    "prepare all files in one way; sample prompts, answers and exports use the template of the first file",
                )
            ]
        first = first or (path, found)
    return []


def _read(path: str) -> _Metadata:
    import pyarrow.parquet as pq

    written = (pq.read_schema(path, memory_map=True).metadata or {}).get(METADATA_KEY, b"")
    if not written or len(written) > _LARGEST:
        return _Metadata()
    try:
        return msgspec.json.decode(written, type=_Metadata)
    except (msgspec.MsgspecError, RecursionError):
        return _Metadata()  # the metadata of another tool
