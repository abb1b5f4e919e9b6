"""Tokenises a piece of a chat file: rows → conversations → texts → token ids and labels, cut to length."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from sftd.domain.data.chat_template import DEFAULT_DATE, ChatTemplate
from sftd.domain.data.rows import IGNORE_INDEX, is_trained, kept, targets
from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.mask import ChatMasker, MaskedChat
from sftd.trainer.chat.render import RenderedChat, Rewritten
from sftd.trainer.chat.rows import Conversation, conversation
from sftd.trainer.chat.shapes import RowKeys
from sftd.trainer.chat.template import check_template
from sftd.trainer.chat.tokenizer import load_tokenizer, stop_token_ids
from sftd.trainer.tools.prepare.sources.chat_files import Piece, rows_of

Truncation = Literal["right", "left", "error", "drop"]
# Size of the cache of maskers for rows with their own template variables.
_MASKERS = 16
NOT_TRAINED = "the row is marked as not trained"
# A row that trains fewer tokens, stop token included, is near-empty.
NEAR_EMPTY = 4


@dataclass(frozen=True)
class TokenizeOptions:
    """Options for the conversion of chats to rows.

    `max_length`: in tokens, None for no limit. `truncation` of a longer chat: cut off its end (`right`) or beginning
    (`left`), fail (`error`), or leave the chat out (`drop`). `val_out` gets `val_fraction` (0 to 1) of the chats or
    `val_rows` rows, chosen by a hash of the chat, so that no chat is in both files, or else `val_split` of the data set
    folders. `rewritten`: treatment of answers that the template rewrites when other turns follow. `skip_bad_rows`: leave
    unusable rows out and count them. `dedupe`: leave out chats that repeat an earlier one in all but case and whitespace.
    `against`: files of validation chats or questions, to compare with. `drop_overlap`: leave out training rows that the
    validation data has. `template_args`, `template_text`, `template_name` and `date`: see `ChatTemplate`.
    """

    max_length: int | None = None
    truncation: Truncation = "right"
    messages_key: str | None = None
    prompt_key: str | None = None
    response_key: str | None = None
    split: str = "train"
    val_fraction: float | None = None
    val_rows: int | None = None
    val_split: str | None = None
    val_out: Path | None = None
    rewritten: Rewritten = "refuse"
    skip_bad_rows: bool = False
    dedupe: bool = False
    against: tuple[Path, ...] = ()
    drop_overlap: bool = False
    template_args: Mapping[str, Any] = field(default_factory=dict)
    template_text: str | None = None
    template_name: str | None = None
    date: str = DEFAULT_DATE
    trust_remote_code: bool = False
    workers: int | None = None

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template for all chats."""
        return ChatTemplate(
            text=self.template_text,
            name=self.template_name,
            date=self.date,
            arguments=dict(self.template_args),
        )

    @property
    def row_keys(self) -> RowKeys:
        """The fields that the user named for the chat."""
        return RowKeys(self.messages_key, self.prompt_key, self.response_key)


@dataclass(frozen=True)
class Row:
    """One row to write: `input_ids` and unshifted `labels` (int32), and the 8-byte key that determines its split.

    `weights`: of the loss of each trained token (float32); None if all are 1. `loose`, `prompt`: keys of
    its chat (see `Conversation`). `place`: of its chat. `cut`: number of tokens cut from its chat. `cut_trained`: number of trained ones among them.
    """

    input_ids: Any
    labels: Any
    weights: Any
    key: bytes
    loose: bytes
    prompt: bytes
    place: str
    cut: int
    cut_trained: int


@dataclass(frozen=True)
class _Chat:
    """What the rows of a chat share: see `Row`. `weight`: of the chat's loss."""

    key: bytes
    loose: bytes
    prompt: bytes
    weight: float = 1.0


@dataclass
class Done:
    """A piece's rows in order, and counts of the others. `rejected`: (place, reason). `dropped`: reason → chats. `unused`:
    unused field or mark → chats. `keys`: 8 bytes for each chat. `near_empty`, `over_long`: places
    of rows that train fewer than `NEAR_EMPTY` tokens, and of those longer than `max_length`, by default the model's context."""

    rows: list[Row] = field(default_factory=list)
    chats: int = 0
    seen: int = 0
    unstopped: int = 0
    as_shown: int = 0
    rewritten: int = 0
    special: int = 0
    unknown: int = 0
    templates: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, int] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    keys: bytearray = field(default_factory=bytearray)
    near_empty: list[str] = field(default_factory=list)
    over_long: list[str] = field(default_factory=list)


class PieceTokenizer:
    """Tokenises pieces with the tokenizer of one model folder. `context`: of the model, in tokens; None if unknown."""

    def __init__(self, model: Path, options: TokenizeOptions) -> None:
        self._options = options
        self.tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
        self._stop_ids = stop_token_ids(self.tokenizer, model)
        self.masker = ChatMasker(self.tokenizer, self._stop_ids, options.chat_template)
        check_template(self.masker.template, model, self.tokenizer)
        self.context = _context_length(model)
        self._limit = options.max_length or self.context
        self._maskers: dict[str, ChatMasker] = {}
        self._words: dict[str, bool] = {}

    def __call__(self, piece: Piece) -> Done:
        """Tokenise one piece. Raises PrepareError at the first unusable row, unless `skip_bad_rows` is set."""
        options, done = self._options, Done()
        rendered: list[tuple[str, _Chat, RenderedChat]] = []
        for place, row in rows_of(piece):
            done.seen += 1
            try:
                if isinstance(row, ChatError):
                    raise row
                chat = conversation(row, options.row_keys)
                texts = self._masker(chat).rows(chat.messages, chat.tools, options.rewritten)
                made = _Chat(chat.key(), chat.loose_key(), chat.prompt_key(), chat.weight)
                special = self.masker.holds_special(chat.messages, chat.tools)
            except (ChatError, RecursionError) as error:
                why = str(error) if isinstance(error, ChatError) else "it is nested too deeply"
                if not options.skip_bad_rows:
                    raise PrepareError(f"{place}: {why}. (--skip-bad-rows leaves such rows out.)") from error
                done.rejected.append((place, why))
                continue
            if not chat.weight:
                done.dropped[NOT_TRAINED] = done.dropped.get(NOT_TRAINED, 0) + 1
                continue
            done.chats += 1
            done.keys += made.key
            for name in self._unused(chat, piece.unread):
                done.unused[name] = done.unused.get(name, 0) + 1
            done.special += special
            for counts, kind in (
                (done.shapes, chat.shape),
                (done.templates, texts[0].template),
                (done.arguments, texts[0].arguments),
            ):
                if kind is not None:
                    counts[kind] = counts.get(kind, 0) + 1
            rendered += [(place, made, text) for text in texts]
        masked = self.masker.encode([text for *_, text in rendered])
        for (place, made, text), whole in zip(rendered, masked, strict=True):
            done.unstopped += whole.unstopped
            done.unknown += whole.loses
            done.as_shown += text.as_shown
            done.rewritten += text.rewritten
            if self._limit is not None and len(whole.input_ids) > self._limit:
                done.over_long.append(place)
            kept = _fit(whole, place, options)
            if isinstance(kept, str):
                done.dropped[kept] = done.dropped.get(kept, 0) + 1
            else:
                row = _row(whole, kept, place, made)
                done.rows.append(row)
                if (targets(row.labels) != IGNORE_INDEX).sum() < NEAR_EMPTY:
                    done.near_empty.append(place)
        return done

    def _masker(self, chat: Conversation) -> ChatMasker:
        """The masker with the row's own template variables, which override those of the command."""
        given = {name: value for name, value in chat.template_args.items() if self._in_template(name)}
        if not given:
            return self.masker
        key = json.dumps(given, sort_keys=True, default=str)
        if key not in self._maskers:
            if len(self._maskers) == _MASKERS:
                del self._maskers[next(iter(self._maskers))]
            chosen = self._options.chat_template
            chosen = msgspec.structs.replace(chosen, arguments={**chosen.arguments, **given})
            self._maskers[key] = ChatMasker(self.tokenizer, self._stop_ids, chosen)
        return self._maskers[key]

    def _unused(self, chat: Conversation, unread: Iterable[str]) -> list[str]:
        """The unused parts of a row, in words for the card."""
        return [
            *chat.unread,
            *unread,
            *(f"{name} of messages" for name in chat.unknown if not self._in_template(name)),
            *(
                f"{name} of chat_template_kwargs"
                for name in chat.template_args
                if not self._in_template(name)
            ),
            *chat.ignored,
        ]

    def _in_template(self, name: str) -> bool:
        """Whether the chat template contains the word and so may use it."""
        if name not in self._words:
            word = re.compile(rf"\b{re.escape(name)}\b")
            self._words[name] = any(map(word.search, self.masker.template.sources.values()))
        return self._words[name]


def _context_length(model: Path) -> int | None:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # only the tokenizer is needed here; the training run checks the model
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _row(whole: MaskedChat, kept: slice, place: str, chat: _Chat) -> Row:
    ids = np.asarray(whole.input_ids, np.int32)
    labels = np.asarray(whole.labels, np.int32)
    left = labels[kept]
    weights = None
    if whole.weights is not None or chat.weight != 1:
        weights = np.float32(chat.weight) * np.asarray(whole.weights or [1.0] * len(ids), np.float32)[kept]
    trained, still = (int((targets(part) != IGNORE_INDEX).sum()) for part in (labels, left))
    cut = len(labels) - len(left)
    return Row(ids[kept], left, weights, chat.key, chat.loose, chat.prompt, place, cut, trained - still)


def _fit(chat: MaskedChat, place: str, options: TokenizeOptions) -> slice | str:
    """The part of a chat that becomes a row, or the reason why there is none."""
    limit, length = options.max_length, len(chat.input_ids)
    part = slice(None)
    if limit is not None and length > limit:
        if options.truncation == "error":
            raise PrepareError(
                f"{place}: the chat has {length} tokens, more than the {limit} allowed. Allow a "
                "greater length, shorten the chat, or choose another truncation: right, left or drop."
            )
        if options.truncation == "drop":
            return "longer than the greatest length"
        part = slice(*kept(0, length, limit, options.truncation))
    return part if any(is_trained(chat.labels[part])) else "no trained token is left"
