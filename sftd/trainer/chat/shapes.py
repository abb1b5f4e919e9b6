"""Which fields of a row hold its chat, and what to say of a row that has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftd.trainer.chat.errors import ChatError

CHAT_FIELDS = ("messages", "conversations")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
ALPACA = ("instruction", "output")
# Marks of rows and messages: whether they are trained.
MARKS = ("weight", "loss", "train", "training", "train_on_turn")
_BESIDE = frozenset({"input", "system", "history", "tools", "chat_template_kwargs", *MARKS})
_READ = _BESIDE.union(CHAT_FIELDS, *_PAIRS)
# Pairs of other data sets, named in advice alone: their words are used for other things as well.
_OTHER_PAIRS = (
    *(("question", name) for name in ("answer", "response", "output", "solution")),
    *(("query", name) for name in ("response", "answer", "output")),
    *(("instruction", name) for name in ("response", "answer", "completion")),
    *(("prompt", name) for name in ("answer", "output", "target")),
    *(("input", name) for name in ("output", "target", "response")),
    *(("problem", name) for name in ("solution", "answer")),
    *(("user", name) for name in ("assistant", "bot")),
    ("source", "target"),
)
ACCEPTED = "messages; conversations; prompt and completion (or response); instruction and output"
# Fields of a row that describe it and ask for nothing: they are on the card, and not in a warning.
PLAIN_FIELDS = frozenset(
    {
        "id",
        "_id",
        "idx",
        "index",
        "uid",
        "uuid",
        "prompt_id",
        "row_id",
        "conversation_id",
        "__index_level_0__",
    }
    | {"name", "title", "source", "data_source", "dataset", "origin", "url", "split", "subset", "config"}
    | {"category", "categories", "topic", "domain", "task", "type", "tags", "language", "lang", "difficulty"}
    | {"license", "model", "generator", "author", "metadata", "meta", "num_tokens", "length"}
    | {"timestamp", "created", "created_at", "date"}
)
_NAMED = 12


@dataclass(frozen=True)
class RowKeys:
    """The fields that a person named for the chat: `messages`, or `prompt` and `response`; None looks for the usual ones."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The fields that were named."""
        return tuple(name for name in (self.messages, self.prompt, self.response) if name is not None)

    def reads(self, field: str) -> bool:
        """Whether a field of this name is read in some shape of row."""
        return field in _READ or field in self.named


def shape_of(fields: Sequence[str], keys: RowKeys) -> tuple[str, ...] | None:
    """The field or the two fields that hold the chat in rows with these fields; None for none. Where a person has named
    fields, no others are taken in their place."""
    if keys.named:
        return keys.named if all(name in fields for name in keys.named) else None
    for name in CHAT_FIELDS:
        if name in fields:
            return (name,)
    return next((pair for pair in _PAIRS if all(name in fields for name in pair)), None)


def require_shape(fields: Sequence[str], keys: RowKeys, row: dict[str, Any] | None = None) -> tuple[str, ...]:
    """As `shape_of`. Raises ChatError, which names the fields found and what could be done; `row` helps with that."""
    if shape := shape_of(fields, keys):
        return shape
    shown = ", ".join(fields[:_NAMED]) + (", …" if len(fields) > _NAMED else "")
    has = f"it has the fields {shown}" if fields else "it has no fields with values"
    if missing := [name for name in keys.named if name not in fields]:
        raise ChatError(f"there is no field {missing[0]!r} (or it is null); {has}. Correct the name")
    if {"chosen", "rejected"} <= set(fields):
        raise ChatError(
            f"this is preference data ({shown}), which is for DPO and the like. To train on the chosen answers, use "
            f"{_chosen(fields, row)}"
        )
    pair = next((pair for pair in _OTHER_PAIRS if set(pair) <= set(fields)), None)
    if pair is None and "text" in fields:
        raise ChatError(
            "this is text without roles (the field text), as for pretraining, which sftd does not do. Write chats: "
            + ACCEPTED
        )
    example = (
        f"--prompt-key {pair[0]} --response-key {pair[1]}" if pair else "--prompt-key and --response-key"
    )
    raise ChatError(
        f"there is no chat in it: {has}. Accepted are {ACCEPTED}. Name other fields with {example}, or a list of messages "
        "with --messages-key"
    )


def _chosen(fields: Sequence[str], row: dict[str, Any] | None) -> str:
    chosen = row.get("chosen") if row else None
    is_whole = isinstance(chosen, list) and len(chosen) > 1
    if "prompt" in fields and not is_whole:
        return "--prompt-key prompt --response-key chosen"
    return "--messages-key chosen"
