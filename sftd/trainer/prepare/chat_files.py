"""Reads conversations from JSON Lines and Parquet files, checked, with their place for messages."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftd.trainer.prepare.errors import ChatError, PrepareError

_ROLES = frozenset({"system", "user", "assistant", "tool"})
_PARQUET_BATCH = 512
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ChatSource:
    """A chat file: its rows (blank lines included) and the sha256 (hex) of its bytes."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class Chat:
    """One conversation; `place` names its file and line or row (from 1) for messages."""

    place: str
    messages: list[dict[str, Any]]


def open_source(path: Path) -> ChatSource:
    """Measure a file. Raises PrepareError when it is missing or of another kind than read here."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise PrepareError(f"{path} is no chat file: its name must end in .jsonl or .parquet.")
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
    rows = _open_parquet(path).metadata.num_rows if path.suffix == ".parquet" else lines + (last != b"\n")
    return ChatSource(path, rows, digest.hexdigest())


def read_chats(source: ChatSource, messages_key: str) -> Iterator[Chat]:
    """Yield a file's conversations in order.

    A row holds a list of `{"role", "content"}` under `messages_key`, or else the strings `prompt` and
    `completion`. Raises PrepareError at the first row that is neither, or whose messages cannot be
    trained on.
    """
    path = source.path
    rows = _parquet_rows(path, messages_key) if path.suffix == ".parquet" else _jsonl_rows(path)
    for place, row in rows:
        try:
            yield Chat(place, _messages(row, messages_key))
        except ChatError as error:
            raise PrepareError(f"{place}: {error}.") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested without end
                raise PrepareError(
                    f"{place} is not JSON ({error}). Write one JSON object a line, in UTF-8."
                ) from error


def _parquet_rows(path: Path, messages_key: str) -> Iterator[tuple[str, Any]]:
    parquet = _open_parquet(path)
    columns = [name for name in (messages_key, "prompt", "completion") if name in parquet.schema_arrow.names]
    if messages_key not in columns and len(columns) < 2:
        raise PrepareError(
            f"{path} has no column {messages_key!r}; it has {', '.join(parquet.schema_arrow.names)}. "
            "Name the column that holds the chats."
        )
    number = 0
    for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise PrepareError(f"{path} is not a Parquet file ({error}).") from error


def _messages(row: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(row, dict):
        raise ChatError(f"the row is {_kind(row)}, not an object with the field {key!r}")
    messages = row.get(key)
    if messages is None and "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    if not isinstance(messages, list) or not messages:
        raise ChatError(
            f"the row has no messages: the field {key!r} must be a list of objects with role and content, "
            "and not empty. Mend or remove the row, or name the field that holds the chat"
        )
    checked = [_message(message, number) for number, message in enumerate(messages, start=1)]
    if not any(message["role"] == "assistant" for message in checked):
        raise ChatError("the chat has no assistant message, so there is nothing to train on. Remove the row")
    return checked


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ChatError(f"message {number} is {_kind(message)}, not an object with role and content")
    # Parquet fills the fields that only other messages have with null.
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"message {number} has the role {role!r}; use one of {', '.join(sorted(_ROLES))}")
    if not isinstance(content, str):
        raise ChatError(
            f"the content of message {number} ({role}) is {_kind(content)}, not a string. Write the text "
            "into it; images and bare tool calls cannot be trained on"
        )
    try:
        json.dumps(given, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"message {number} ({role}) is not valid Unicode ({error.reason}). Mend or remove the row"
        ) from error
    if role == "assistant" and not content.strip():
        raise ChatError(f"message {number} is an empty answer of the assistant. Remove the row or the turn")
    return given


def _kind(value: Any) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def digest_of_chat(messages: Sequence[dict[str, Any]]) -> bytes:
    """sha256 of a conversation's content, the same wherever it stands."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()).digest()
