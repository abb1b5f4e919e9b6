"""Checks that a chat template keeps the whole text of the messages."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftd.trainer.chat.reasoning import REASONING

# A shorter text may occur by chance in a role's name or the template's own words.
_SHORT = 10
# Number of characters before an answer in which it may begin, such as `<think>` in a generation prompt.
_HEAD = 64


def lost_of_answer(message: Mapping[str, Any], shown: str, before: str = "") -> str | None:
    """Description of a part of an assistant's message that is missing in `shown`; None when it is complete. The message may
    begin at the end of `before`, the text before `shown`."""
    squeezed, head = _squeeze(shown), _squeeze(before[-_HEAD:])

    def is_there(part: Any) -> bool:
        return _has(squeezed, part) or (isinstance(part, str) and _straddles(head, squeezed, _squeeze(part)))

    if not is_there(message.get("content")):
        return "part of the content"
    if not all(is_there(message.get(field)) for field in REASONING):
        return "the reasoning"
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        parts = [function.get("name"), *_leaves(function.get("arguments"))]
        if not all(_has(squeezed, part) for part in parts):
            return "the tool calls"
    return None


def first_lost_message(messages: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """Index of the first message of a system, user or tool that `text` does not contain, whitespace ignored."""
    squeezed = _squeeze(text)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" and not _has(squeezed, message.get("content")):
            return turn
    return None


def doubtful_messages(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the messages of a system, user or tool whose text may occur by chance: short ones, and those that another
    message contains."""
    contents = [_squeeze(str(message.get("content") or "")) for message in messages]
    everything = "\n".join([*contents, *(json.dumps(m.get("tool_calls"), default=str) for m in messages)])
    return [
        turn
        for turn, (message, content) in enumerate(zip(messages, contents, strict=True))
        if message["role"] != "assistant" and content
        if len(content) < _SHORT or everything.count(content) > 1
    ]


def first_lost_tool(tools: Sequence[Any] | None, text: str) -> str | None:
    """The name of the first tool that the text does not contain."""
    names = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
    return next((name for name in names if isinstance(name, str) and name not in text), None)


def _has(squeezed: str, part: Any) -> bool:
    if part is None:
        return True
    wanted = part if isinstance(part, str) else json.dumps(part)
    # Jinja's `tojson` and transformers' escape different characters.
    forms = (wanted, json.dumps(wanted)[1:-1], json.dumps(wanted, ensure_ascii=False)[1:-1])
    return any(_squeeze(form) in squeezed for form in forms)


def _straddles(head: str, shown: str, part: str) -> bool:
    """Whether `part` begins at the end of `head` and ends at the beginning of `shown`."""
    return any(
        head.endswith(part[:cut]) and shown.startswith(part[cut:])
        for cut in range(1, min(len(head) + 1, len(part)))
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and strings in arguments. Templates format other values differently."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _squeeze(text: str) -> str:
    return "".join(text.split())
