"""Whether a chat template has kept what the messages hold: nothing of them is left out without a word."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftd.trainer.chat.reasoning import REASONING

# Characters that a role's name or a template's own words may happen to have.
_SHORT = 10
# Characters before an answer that its beginning is looked for in: a generation prompt may hold it, such as `<think>`.
_HEAD = 64


def lost_of_answer(message: Mapping[str, Any], shown: str, before: str = "") -> str | None:
    """What of an assistant's message is not in the text that shows it, in words; None when all is there. Its beginning
    may be at the end of `before`, the text before that."""
    squeezed, head = _squeeze(shown), _squeeze(before[-_HEAD:])

    def is_there(part: Any) -> bool:
        return _has(squeezed, part) or (isinstance(part, str) and _straddles(head, squeezed, _squeeze(part)))

    if not is_there(message.get("content")):
        return "a part of the content"
    if not all(is_there(message.get(field)) for field in REASONING):
        return "the reasoning"
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        parts = [function.get("name"), *_leaves(function.get("arguments"))]
        if not all(_has(squeezed, part) for part in parts):
            return "the tool calls"
    return None


def first_lost_message(messages: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """The first message of a system, user or tool that is not in the whole text, whole but for blanks."""
    squeezed = _squeeze(text)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" and not _has(squeezed, message.get("content")):
            return turn
    return None


def doubtful_messages(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The messages of a system, user or tool whose words may be in the text without them: short ones, and those that
    another message holds."""
    contents = [_squeeze(str(message.get("content") or "")) for message in messages]
    everything = "\n".join([*contents, *(json.dumps(m.get("tool_calls"), default=str) for m in messages)])
    return [
        turn
        for turn, (message, content) in enumerate(zip(messages, contents, strict=True))
        if message["role"] != "assistant" and content
        if len(content) < _SHORT or everything.count(content) > 1
    ]


def first_lost_tool(tools: Sequence[Any] | None, text: str) -> str | None:
    """The name of the first tool that the whole text does not name."""
    names = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
    return next((name for name in names if isinstance(name, str) and name not in text), None)


def _has(squeezed: str, part: Any) -> bool:
    if part is None:
        return True
    wanted = part if isinstance(part, str) else json.dumps(part)
    # Templates write JSON by Jinja's `tojson` or transformers', which differ in what they escape.
    forms = (wanted, json.dumps(wanted)[1:-1], json.dumps(wanted, ensure_ascii=False)[1:-1])
    return any(_squeeze(form) in squeezed for form in forms)


def _straddles(head: str, shown: str, part: str) -> bool:
    """Whether the part begins at the end of the head and continues at the beginning of what is shown."""
    return any(
        head.endswith(part[:cut]) and shown.startswith(part[cut:])
        for cut in range(1, min(len(head) + 1, len(part)))
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The strings and numbers inside of arguments; templates write the rest in their own ways."""
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
