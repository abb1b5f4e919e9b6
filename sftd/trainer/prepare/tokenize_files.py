"""Tokenises chat files into Parquet: the data set that a training run reads."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sftd.trainer.prepare.chat_files import Chat, ChatSource, digest_of_chat, open_source, read_chats
from sftd.trainer.prepare.chat_mask import IGNORE_INDEX, ChatMasker, MaskedChat, RenderedChat
from sftd.trainer.prepare.errors import ChatError, PrepareError
from sftd.trainer.prepare.hf_tokenizer import (
    chat_template_sha256,
    load_tokenizer,
    stop_token_ids,
    tokenizer_digest,
)
from sftd.trainer.prepare.progress import EventWriter

Truncation = Literal["right", "left", "error", "drop"]

METADATA_KEY = b"sftd"
_COLUMNS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
    ]
)
_BATCH_CHATS = 256
_ROW_GROUP_ROWS = 1000


@dataclass(frozen=True)
class TokenizeOptions:
    """How chats become rows.

    `max_length` in tokens, None for no limit. `truncation` says what becomes of a longer chat: its
    end (`right`) or beginning (`left`) is cut off, the run fails (`error`), or the chat is left out
    (`drop`). `val_fraction` (0 to 1) of the chats goes to `val_out`, chosen by a hash of the chat, so
    that the same chat is never in both files.
    """

    max_length: int | None = None
    truncation: Truncation = "right"
    messages_key: str = "messages"
    val_fraction: float | None = None
    val_out: Path | None = None
    trust_remote_code: bool = False


class _RowFile:
    """A Parquet file being written beside its final name; `publish` puts it in place."""

    def __init__(self, path: Path, metadata: bytes) -> None:
        self.path = path
        self.rows = self.tokens = self.trained_tokens = self.longest = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(path.name + ".partial")
        self._schema = _COLUMNS.with_metadata({METADATA_KEY: metadata})
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        self._pending: list[MaskedChat] = []

    def append(self, chat: MaskedChat) -> None:
        self.rows += 1
        self.tokens += len(chat.input_ids)
        self.trained_tokens += len(chat.labels) - chat.labels.count(IGNORE_INDEX)
        self.longest = max(self.longest, len(chat.input_ids))
        self._pending.append(chat)
        if len(self._pending) == _ROW_GROUP_ROWS:
            self._write_row_group()

    def close(self) -> None:
        if self._pending and self._writer.is_open:
            self._write_row_group()
        self._writer.close()

    def publish(self) -> dict[str, Any]:
        """Rename the closed file into place and return what the `done` event says of it."""
        with self._partial.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self._partial.replace(self.path)
        return {
            "path": str(self.path.resolve()),
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "max_length": self.longest,
            "sha256": sha256,
        }

    def discard(self) -> None:
        """Remove what has not been published."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def _write_row_group(self) -> None:
        ids = [chat.input_ids for chat in self._pending]
        columns = [ids, [[1] * len(row) for row in ids], [chat.labels for chat in self._pending]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._pending = []


def tokenize_files(
    sources: Sequence[Path], model: Path, out: Path, options: TokenizeOptions, events: EventWriter
) -> dict[str, Any]:
    """Tokenise the chats of `sources`, in order, with the tokenizer of the folder `model` to `out`.

    The Parquet file has the columns `input_ids` list<int32>, `attention_mask` list<int8> (all 1) and
    `labels` list<int32> (unshifted; -100 where not trained), and under the metadata key `sftd` a JSON
    object that identifies tokenizer, chat template and sources. The same input gives the same bytes.
    At most one batch of chats and one row group are in memory.

    Returns the fields of the `done` event: those of `out` (`path`, `rows`, `tokens`, `trained_tokens`,
    `max_length`, `sha256`), the same under `val` (null without a split), and of both together
    `truncated`, `dropped`, `stop_token`, `tokenizer_digest` and `warnings`. Raises PrepareError.
    """
    _check(sources, out, options)
    opened = [open_source(path) for path in sources]
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    masker = ChatMasker(tokenizer, stop_token_ids(tokenizer, model))
    digest = tokenizer_digest(tokenizer)
    metadata = {
        "format": 1,
        "tokenizer_digest": digest,
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "vocab_size": len(tokenizer),
        "sources": [
            {"name": source.path.name, "rows": source.rows, "sha256": source.sha256} for source in opened
        ],
        "max_length": options.max_length,
        "truncation": options.truncation,
        "val_fraction": options.val_fraction,
    }
    files: list[_RowFile] = []
    try:
        train = _RowFile(out, _dump(metadata | {"split": "train"}))
        files.append(train)
        val = None
        if options.val_out is not None:
            val = _RowFile(options.val_out, _dump(metadata | {"split": "val"}))
            files.append(val)
        counts = _write_rows(opened, masker, train, val, options, events)
        for file in files:
            file.close()
            _refuse_empty(file, counts, options)
        published = [file.publish() for file in files]
    finally:
        for file in files:
            file.discard()
    return published[0] | {
        "val": published[1] if val is not None else None,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "stop_token": masker.stop_token,
        "tokenizer_digest": digest,
        "warnings": _warnings(counts, model, max(file.longest for file in files)),
    }


@dataclass
class _Counts:
    kept: int = 0  # rows written
    truncated: int = 0  # rows written shorter than their chat
    dropped: int = 0  # chats not written: too long, or nothing trained is left of them
    unstopped: int = 0  # answers without a stop token


def _write_rows(
    sources: Sequence[ChatSource],
    masker: ChatMasker,
    train: _RowFile,
    val: _RowFile | None,
    options: TokenizeOptions,
    events: EventWriter,
) -> _Counts:
    counts = _Counts()
    total = sum(source.rows for source in sources)
    done = 0
    chats = itertools.chain.from_iterable(read_chats(source, options.messages_key) for source in sources)
    for batch in itertools.batched(chats, _BATCH_CHATS):
        masked = masker.encode([_render(masker, chat) for chat in batch])
        for chat, whole in zip(batch, masked, strict=True):
            counts.unstopped += whole.unstopped
            row = _fit(whole, chat.place, options)
            if row is None or row.labels.count(IGNORE_INDEX) == len(row.labels):
                counts.dropped += 1
                continue
            counts.kept += 1
            counts.truncated += len(row.labels) < len(whole.labels)
            held_out = val is not None and _fraction(chat) < (options.val_fraction or 0.0)
            (val if val is not None and held_out else train).append(row)
        done += len(batch)
        events.progress("tokenize", rows=done, total=total)
    return counts


def _render(masker: ChatMasker, chat: Chat) -> RenderedChat:
    try:
        return masker.render(chat.messages)
    except ChatError as error:
        raise PrepareError(f"{chat.place}: {error}.") from error


def _fit(chat: MaskedChat, place: str, options: TokenizeOptions) -> MaskedChat | None:
    limit = options.max_length
    if limit is None or len(chat.input_ids) <= limit:
        return chat
    if options.truncation == "error":
        raise PrepareError(
            f"{place}: the chat has {len(chat.input_ids)} tokens, more than the {limit} allowed. Allow a "
            "greater length, shorten the chat, or choose another truncation: right, left or drop."
        )
    if options.truncation == "drop":
        return None
    kept = slice(limit) if options.truncation == "right" else slice(-limit, None)
    return replace(chat, input_ids=chat.input_ids[kept], labels=chat.labels[kept])


def _fraction(chat: Chat) -> float:
    """A number in [0, 1) that depends on the chat's content alone."""
    return int.from_bytes(digest_of_chat(chat.messages)[:6], "big") / 2**48


def _check(sources: Sequence[Path], out: Path, options: TokenizeOptions) -> None:
    if options.max_length is not None and options.max_length < 2:
        raise PrepareError(f"The greatest length is {options.max_length} tokens; it must be at least 2.")
    if (options.val_fraction is None) != (options.val_out is None):
        raise PrepareError("A validation split needs both its fraction and its file; only one is given.")
    if options.val_fraction is not None and not 0.0 < options.val_fraction < 1.0:
        raise PrepareError(f"The validation fraction is {options.val_fraction}; it must lie between 0 and 1.")
    written = [out.resolve()] + ([options.val_out.resolve()] if options.val_out is not None else [])
    if len({*written, *(path.resolve() for path in sources)}) < len(written) + len(
        set(map(Path.resolve, sources))
    ):
        raise PrepareError(
            f"A file to write ({', '.join(map(str, written))}) is also another of the files named."
        )


def _refuse_empty(file: _RowFile, counts: _Counts, options: TokenizeOptions) -> None:
    if file.rows:
        return
    if file.path == options.val_out:
        raise PrepareError(
            f"No chat fell into the validation fraction of {options.val_fraction}. Make it greater, or give "
            "more chats."
        )
    reason = "the sources hold no chats"
    if counts.kept:
        reason = f"all chats fell into the validation fraction of {options.val_fraction}"
    elif counts.dropped:
        reason = (
            f"all {counts.dropped} chats were dropped at the greatest length of {options.max_length} tokens"
        )
    raise PrepareError(f"There is nothing to train on: {reason}.")


def _warnings(counts: _Counts, model: Path, longest: int) -> list[str]:
    warnings = []
    if counts.unstopped:
        warnings.append(
            f"{counts.unstopped} answers are trained without a stop token, so the model does not learn to "
            "stop: the chat template puts no special token directly after them"
        )
    context = _context_length(model)
    if context is not None and longest > context:
        warnings.append(
            f"the longest row has {longest} tokens, but the model was trained with a context of {context}"
        )
    return warnings


def _context_length(model: Path) -> int | None:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # only the tokenizer was needed; the training run checks the model
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _dump(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True).encode()
