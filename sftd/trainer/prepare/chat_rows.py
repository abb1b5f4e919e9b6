"""One row of a file as a conversation, whatever shape the row has, checked.

Shapes, by their fields: `messages` (role and content), `conversations` (ShareGPT's from and value), `prompt` and
`completion` (or `response`; text or messages), `instruction` and `output` (Alpaca, with `input`, `system`, `history`).
`tools` beside any of them are the tools that the model is told of.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftd.trainer.prepare.errors import ChatError
from sftd.trainer.prepare.tool_arguments import ParsedArguments

CHAT_FIELDS = ("messages", "conversations")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
# Every field that is read, beside the one that a person names.
FIELDS = (
    *CHAT_FIELDS,
    "prompt",
    "completion",
    "response",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
_CALLS = frozenset({"function_call", "tool_call"})


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and the tools that the model is told of; `shape` names the row's shape."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    shape: str

    def key(self) -> bytes:
        """8 bytes by the conversation's content, the same wherever it stands and whatever shape its row has."""
        content = [
            {k: v.strip() if isinstance(v, str) else v for k, v in message.items() if k != "weight"}
            for message in self.messages
        ]
        # Columns of Parquet hold more kinds of values than JSON, such as times.
        text = json.dumps([content, self.tools], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).digest()[:8]


def shape_of(fields: Sequence[str], key: str | None) -> str | None:
    """Name of the shape that rows with these fields have: the field or fields that hold the chat; None for none. Where
    a person has named the field, no other is taken in its place."""
    if key:
        return key if key in fields else None
    for name in CHAT_FIELDS:
        if name in fields:
            return name
    for pair in _PAIRS:
        if all(name in fields for name in pair):
            return "+".join(pair)
    return None


def conversation(row: Any, key: str | None, *, fills_nulls: bool = False) -> Conversation:
    """Read a row. `key` names the field of the chat, None looks for one. With `fills_nulls` a null inside of a message
    means that the field is not there, as in the columns of Parquet. Raises ChatError."""
    named = repr(key or CHAT_FIELDS[0])
    if not isinstance(row, dict):
        raise ChatError(f"the row is {_kind(row)}, not an object with the field {named}")
    given = {name: value for name, value in row.items() if value is not None}
    if fills_nulls:
        given = {name: _without_nulls(value) for name, value in given.items()}
    shape = shape_of(list(given), key)
    if shape is None:
        raise ChatError(
            f"the row has no messages: the field {named} must be a list of objects with role and content, "
            "and not empty. Fix or remove the row, or name the field that holds the chat"
        )
    messages = _alpaca(given) if shape == "instruction+output" else None
    if messages is None and "+" in shape:
        prompt, completion = (given[name] for name in shape.split("+"))
        messages = [*_side(prompt, "user", shape), *_side(completion, "assistant", shape)]
    if messages is None:
        messages = given[shape]
        if not isinstance(messages, list) or not messages:
            raise ChatError(
                f"the row has no messages: the field {shape!r} must be a list of objects with role and content, "
                "and not empty. Fix or remove the row, or name the field that holds the chat"
            )
    checked = [_message(message, number) for number, message in enumerate(messages, start=1)]
    system = given.get("system", "")
    if not isinstance(system, str):
        raise ChatError(f"the field 'system' is {_kind(system)}, not a text")
    if system.strip() and checked[0]["role"] != "system":
        checked.insert(0, {"role": "system", "content": system})
        _check_text(system, "the field 'system'")
    answers = [message for message in checked if message["role"] == "assistant"]
    if not answers:
        raise ChatError("the chat has no assistant message, so there is nothing to train on. Remove the row")
    if all(answer.get("weight") == 0 for answer in answers):
        raise ChatError(
            "all of the assistant's messages have the weight 0: nothing is trained. Remove the row"
        )
    return Conversation(checked, _tools(given.get("tools")), shape)


def _side(value: Any, role: str, shape: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise ChatError(f"in a row with {shape}, one is {_kind(value)}: each is a text or a list of messages")


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    question, more = row["instruction"], row.get("input")
    if not isinstance(question, str) or not isinstance(row["output"], str):
        raise ChatError("instruction and output must be texts")
    if more is not None and not isinstance(more, str):
        raise ChatError(f"the input is {_kind(more)}, not a text")
    messages = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ChatError("the history must be a list of pairs of question and answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    text = f"{question}\n\n{more}" if more and more.strip() else question
    return [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": row["output"]}]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ChatError(f"message {number} is {_kind(message)}, not an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "role" not in given:
        given["role"] = given.pop("from")
        if "value" in given and "content" not in given:
            given["content"] = given.pop("value")
    role = given.get("role")
    if isinstance(role, str) and role in _CALLS:
        given |= {"role": "assistant", "tool_calls": given.get("content"), "content": ""}
    elif isinstance(role, str):
        given["role"] = _ALIASES.get(role, role)
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"message {number} has the role {role!r}; use one of {', '.join(sorted(_ROLES))}")
    if role == "assistant" and "function_call" in given:  # OpenAI's older form
        given.setdefault("tool_calls", given.pop("function_call"))
    if "tool_calls" in given:
        given["tool_calls"] = _calls(given["tool_calls"], number)
        if not given["tool_calls"]:
            del given["tool_calls"]
        given.setdefault("content", "")
    given["content"] = _content(given.get("content"), number, role)
    _check_text(given, f"message {number} ({role})")
    if role == "assistant" and not given["content"].strip() and "tool_calls" not in given:
        raise ChatError(f"message {number} is an empty answer of the assistant. Remove the row or the turn")
    if given.get("weight", 1) not in (0, 1):
        raise ChatError(f"message {number} has the weight {given['weight']!r}; it can only be 0 or 1")
    return given


def _content(content: Any, number: int, role: str) -> str:
    if isinstance(content, list):
        texts = [_text_part(part) for part in content]
        if None not in texts:
            return "".join(filter(None, texts))
    if role == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise ChatError(
            f"the content of message {number} ({role}) is {_kind(content)}, not a string. Write the text "
            "into it; images cannot be trained on"
        )
    return content


def _text_part(part: Any) -> str | None:
    """The text of a part of a content in parts; None for an image and the like."""
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") == "text" else None
    return part if isinstance(part, str) else None


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError as error:
            raise ChatError(
                f"the tool calls of message {number} are text that is not JSON ({error})"
            ) from error
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError(
                f"a tool call of message {number} is not an object with the function's name and arguments"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as in OpenAI's files; most templates expect the object
            try:
                parsed = json.loads(arguments)
            except ValueError as error:
                raise ChatError(
                    f"the arguments of the tool call {function['name']!r} in message {number} are not JSON ({error})"
                ) from error
            arguments = ParsedArguments(parsed, arguments) if isinstance(parsed, dict) else arguments
        made = {"type": "function", "function": {**function, "arguments": arguments}}
        checked.append(made if call is function else {**call, **made})
    return checked


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ChatError(f"the field 'tools' is text that is not JSON ({error})") from error
    if not tools:
        return None
    if isinstance(tools, list):
        try:
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        except ValueError as error:
            raise ChatError(f"the field 'tools' has a text that is not JSON ({error})") from error
        if all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
            _check_text(tools, "the field 'tools'")
            return tools
    raise ChatError(
        "the field 'tools' must be a list of objects (JSON schemas of functions), or JSON text of it"
    )


def _check_text(value: Any, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ChatError(f"{what} is not valid Unicode ({error.reason}). Fix or remove the row") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _kind(value: Any) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
