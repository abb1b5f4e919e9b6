"""A tool call's arguments in the two forms that chat templates support: an object, or its JSON text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Message = dict[str, Any]
# The form in which a template gets the arguments.
Form = Literal["object", "text"]


class ParsedArguments(dict[str, Any]):
    """Arguments that the row has as JSON text, which is `text`."""

    def __init__(self, arguments: Mapping[str, Any], text: str) -> None:
        super().__init__(arguments)
        self.text = text


def have_objects(messages: Sequence[Message]) -> bool:
    """Whether a call has its arguments as an object."""
    return any(True for _ in _objects(messages))


def as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with all arguments as text: the row's own text if there is one, or else the object as JSON."""
    return [
        message | {"tool_calls": [_call_as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def printed_by_python(messages: Sequence[Message], text: str) -> bool:
    """Whether the text has arguments in Python's dict notation: the template expects text but got an object."""
    return any(arguments and repr(dict(arguments)) in text for arguments in _objects(messages))


def _objects(messages: Sequence[Message]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments")
            if isinstance(arguments, Mapping):
                yield arguments


def _call_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, ParsedArguments):
        arguments = arguments.text
    elif isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False, default=str)
    return {**call, "function": {**function, "arguments": arguments}}
