"""Finds the fields of a row that hold its chat, and explains a row without any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftd.trainer.chat.errors import ChatError

CHAT_FIELDS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
ALPACA = ("instruction", "output")
# Marks of rows and messages: whether they are trained.
MARKS = ("weight", "loss", "train", "training", "train_on_turn")
_BESIDE = frozenset({"input", "system", "history", "tools", "functions", "chat_template_kwargs", *MARKS})
_READ = _BESIDE.union(CHAT_FIELDS, *_PAIRS)
# Pairs of other data sets. Used only in advice, because these names have other meanings too.
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
# Fields of a row that only describe it. The card lists them, but there is no warning.
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
    """The fields that the user named for the chat: `messages`, or `prompt` and `response`. All None: detect them."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The named fields."""
        return tuple(name for name in (self.messages, self.prompt, self.response) if name is not None)

    def reads(self, field: str) -> bool:
        """Whether some shape of row uses a field of this name."""
        return field in _READ or field in self.named


def shape_of(fields: Sequence[str], keys: RowKeys) -> tuple[str, ...] | None:
    """The one or two of the `fields` that hold the chat; None if there are none. If the user named fields, no others
    count."""
    if keys.named:
        return keys.named if all(name in fields for name in keys.named) else None
    for name in CHAT_FIELDS:
        if name in fields:
            return (name,)
    return next((pair for pair in _PAIRS if all(name in fields for name in pair)), None)


def require_shape(fields: Sequence[str], keys: RowKeys, row: dict[str, Any] | None = None) -> tuple[str, ...]:
    """As `shape_of`, but raises ChatError with the fields found and a fix, for which `row` is an example."""
    if shape := shape_of(fields, keys):
        return shape
    shown = ", ".join(fields[:_NAMED]) + (", …" if len(fields) > _NAMED else "")
    has = f"it has the fields {shown}" if fields else "it has no fields with values"
    if missing := [name for name in keys.named if name not in fields]:
        raise ChatError(f"there is no field {missing[0]!r} (or it is null); {has}. Correct the name")
    if {"chosen", "rejected"} <= set(fields):
        raise ChatError(
            f"this is preference data ({shown}), for methods such as DPO. To train on the chosen answers, use "
            f"{_chosen(fields, row)}"
        )
    pair = next((pair for pair in _OTHER_PAIRS if set(pair) <= set(fields)), None)
    if pair is None and "text" in fields:
        raise ChatError(
            "this is text without roles (the field text), as for pretraining, which sftd does not support. Write chats: "
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
