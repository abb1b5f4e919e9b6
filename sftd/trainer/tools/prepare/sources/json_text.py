"""Reads JSON files in a stream: one row per line, an array of rows, or rows that span several lines."""

import io
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.sources.file_kinds import open_bytes

_BLOCK = 1 << 20
# A longer first line that opens an array is not a row: the whole array is on that line.
_LONGEST_ROW = 1 << 24
# Endings of a line of indented JSON that is not a row by itself.
_OPEN_ENDS = (b"{", b"[", b",")


def has_a_row_a_line(path: Path) -> bool:
    """Whether each line of the file is a row. Otherwise use `json_rows`."""
    with open_bytes(path) as stream:
        start = stream.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
        while not start.strip():
            if not (start := stream.read(1)):
                return True
        start = start.lstrip()
        if not start.startswith((b"{", b"[")):
            return True
        is_array = start.startswith(b"[")
        limit = _LONGEST_ROW if is_array else -1
        first = (start if start.endswith(b"\n") else start + stream.readline(limit)).strip()
        # A first line with an array is a row, a list of messages, if other rows follow.
        if is_array and not (stream.read(_BLOCK).strip() and first.endswith(b"]")):
            return False
        is_one = not is_array and not stream.read(1)
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return not is_array and (is_one or not first.endswith(_OPEN_ENDS))
    return True


def json_lines(path: Path) -> Iterator[bytes]:
    """The lines of the file, without a byte order mark."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream):
            yield line if number else line.removeprefix(BOM_UTF8)


def json_rows(path: Path) -> Iterator[bytes]:
    """The values of an array or of a file with several values, each as one line. Raises PrepareError."""
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

    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
        text, position, ended = read(stream, _BLOCK), 0, False
        while text.isspace():
            text = read(stream, _BLOCK)
        is_array = text.lstrip().startswith("[")
        if is_array:
            position = text.index("[") + 1
        between = "," if is_array else ""
        while True:
            while position < len(text) and (text[position].isspace() or text[position] in between):
                position += 1
            if position == len(text) and ended and not is_array:
                return
            if is_array and position < len(text) and text[position] == "]":
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
                # The rest of the value may not have been read yet.
                more = read(stream, max(_BLOCK, len(text) - position))
                ended = not more
                text, position = text[position:] + more, 0
                continue
            rows += 1
            yield json.dumps(value).encode() + b"\n"
            position = after
