"""Converts a row of a file, in any supported shape, to a checked conversation.

Shapes, by their fields: `messages` (role and content), `conversations` (ShareGPT's from and value), `prompt` and
`completion` (or `response`; text or messages), `instruction` and `output` (Alpaca, with `input`, `system`, `history`); or
the row itself is the list of messages. Any shape may have `tools` (or `functions`), the model's tools, and
`chat_template_kwargs`, variables of the chat template.
"""

import ast
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sftd.trainer.chat.blocks import function_of, without_blocks
from sftd.trainer.chat.errors import ChatError
from sftd.trainer.chat.shapes import ALPACA, MARKS, RowKeys, require_shape
from sftd.trainer.chat.tool_arguments import ParsedArguments

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
_CALLS = frozenset({"function_call", "tool_call"})
# Other names of a message's content.
_CONTENTS = ("value", "text")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})

# Fields of a message that are read here or used by templates.
_FIELDS = frozenset(
    {"role", "content", "from", *_CONTENTS, "name", "tool_calls", "tool_call_id", "function_call", "refusal"}
    | {"reasoning_content", "reasoning", "thinking", *MARKS}
)
# Keywords of a JSON schema whose value may be null.
_NULLABLE = frozenset({"default", "const", "example"})
_MAX_KEYS = 64


@dataclass(frozen=True)
class Conversation:
    """A checked conversation. `messages` have role, content (text) and, for an assistant, tool_calls; an answer with the
    `weight` 0 is not trained. `tools`: in the form for a template, or None. `shape`: the source field or fields.

    `template_args`: the row's variables for the template. `weight`: of the row's loss; 0 for a row marked as not trained.
    `unread`: the row's unused fields. `unknown`: fields of messages that only a template could use. `ignored`: marks that have
    no effect.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    shape: str
    template_args: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    unread: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def key(self) -> bytes:
        """8-byte hash of the conversation's content, independent of its place and of the shape of its row."""
        return self._digest(self.messages, str.strip)

    def loose_key(self) -> bytes:
        """As `key`, but equal for texts that differ in case and whitespace only."""
        return self._digest(self.messages, _loosened)

    def prompt_key(self) -> bytes:
        """As `loose_key`, of the user's messages alone."""
        asked = [{"content": m["content"]} for m in self.messages if m["role"] == "user"]
        return self._digest(asked, _loosened)

    def _digest(self, messages: list[dict[str, Any]], text_of: Callable[[str], str]) -> bytes:
        content = [
            {k: text_of(v) if isinstance(v, str) else v for k, v in message.items() if k != "weight"}
            for message in messages
        ]
        # Parquet has types that JSON lacks, such as times.
        tools = self.tools if messages is self.messages else None
        text = json.dumps([content, tools], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).digest()[:8]


def conversation(row: Any, keys: RowKeys | None = None) -> Conversation:
    """Read a row. `keys` names the fields of the chat; None detects them. Raises ChatError."""
    keys = keys or RowKeys()
    if isinstance(row, list) and not keys.named:
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ChatError(f"the row is {_kind(row)}, not an object with the fields of a chat")
    given = {name: value for name, value in row.items() if value is not None}
    fields = require_shape(list(given), keys, given)
    shape = "+".join(fields)
    if fields == ALPACA and not keys.named:
        messages: Any = _alpaca(given)
    elif len(fields) == 2:
        prompt, answer = (given[name] for name in fields)
        messages = [*_side(prompt, "user", shape), *_side(answer, "assistant", shape)]
    else:
        messages = _parsed(given[shape], f"the field {shape!r}", opens="[")
        if not isinstance(messages, list) or not messages:
            raise ChatError(
                f"the row has no messages: the field {shape!r} must be a list of objects with role and content, "
                "and not empty. Fix or remove the row, or name the field that holds the chat"
            )
    weight = None if _number(given.get("weight")) is None else _weight(given["weight"], "the row")
    marks = {name: given[name] for name in MARKS if name in given and (name != "weight" or weight is None)}
    ignored = [f"{name} of a row" for name, value in marks.items() if not _is_mark(value)]
    is_trained = all(value for value in marks.values() if _is_mark(value))
    unknown = {
        name for message in messages if isinstance(message, dict) for name in message if name not in _FIELDS
    }
    checked = []
    messages = [part for message in messages for part in without_blocks(message)]
    for number, message in enumerate(messages, start=1):
        made = _message(message, number)
        if made["role"] != "assistant" and made.pop("weight", 0):
            ignored.append(f"weight of a {made['role']} message")
        checked.append(made)
    system = given.get("system", "")
    if isinstance(system, list) and (joined := _joined(system)) is not None:
        system = joined
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
    return Conversation(
        checked,
        _tools(given.get("tools", given.get("functions"))),
        shape,
        _template_args(given.get("chat_template_kwargs")),
        (1.0 if weight is None else weight) * is_trained,
        tuple(name for name in list(given)[:_MAX_KEYS] if not keys.reads(name)),
        tuple(sorted(map(str, unknown))[:_MAX_KEYS]),
        tuple(ignored),
    )


def _is_mark(value: Any) -> bool:
    """Whether a value is a valid mark: a boolean, 0 or 1."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def _loosened(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(value: Any) -> float | None:
    """A number, or the number that a text has, as in CSV; None for other values."""
    try:
        return float(value) if isinstance(value, bool | int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _weight(value: Any, where: str) -> float:
    weight = _number(value)
    if weight is not None and 0 <= weight < math.inf:
        return weight
    raise ChatError(f"{where} has the weight {str(value)[:40]}; it must be a number that is 0 or greater")


def _parsed(value: Any, what: str, opens: str = "[{") -> Any:
    """The parsed value of JSON text; any other value unchanged. Raises ChatError."""
    if not isinstance(value, str) or value.lstrip()[:1] not in tuple(opens):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if (made := _python_value(value)) is None:
            raise ChatError(f"{what} is text that is not JSON ({error})") from error
        return made


def _python_value(text: str) -> Any:
    """The value of a list or dict as Python prints it, which pandas writes into CSV; None for other text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual escapes
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _template_args(value: Any) -> dict[str, Any]:
    value = _parsed(value, "the field 'chat_template_kwargs'") if value else {}
    if not isinstance(value, dict):
        raise ChatError(f"the field 'chat_template_kwargs' is {_kind(value)}, not an object")
    return value


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
    _take_marks(given, number)
    if "from" in given and "role" not in given:
        given["role"] = given.pop("from")
    if "content" not in given and (name := next((n for n in _CONTENTS if n in given), None)):
        given["content"] = given.pop(name)
    named = given.get("role")
    role = named.lower() if isinstance(named, str) else None
    if role in _CALLS:
        given |= {"tool_calls": given.get("content"), "content": ""}
        role = "assistant"
    role = _ALIASES.get(str(role), role)
    if role is None or role not in _ROLES:
        raise ChatError(f"message {number} has the role {named!r}; use one of {', '.join(sorted(_ROLES))}")
    given["role"] = role
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
    return given


def _take_marks(message: dict[str, Any], number: int) -> None:
    """Replace a message's marks with its `weight`, a number that is 0 or greater."""
    marks = {name: message.pop(name) for name in MARKS if name in message}
    if "weight" in marks:
        marks["weight"] = _weight(marks["weight"], f"message {number}")
    for name, value in marks.items():
        if name != "weight" and not _is_mark(value):
            raise ChatError(
                f"message {number} has the {name} {str(value)[:40]}; it can only be 0 or 1, false or true"
            )
    if len({bool(value) for value in marks.values()}) > 1:
        raise ChatError(f"the marks of message {number} contradict each other: {', '.join(marks)}")
    if marks:
        message["weight"] = float(next(iter(marks.values())))


def _content(content: Any, number: int, role: str) -> str:
    if isinstance(content, list) and (joined := _joined(content)) is not None:
        return joined
    if role == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise ChatError(
            f"the content of message {number} ({role}) is {_kind(content)}, not a string. Write the text "
            "into it; images cannot be trained on"
        )
    return content


def _joined(parts: list[Any]) -> str | None:
    """The text of a content in parts; None if some are not text."""
    texts = [_text_part(part) for part in parts]
    return None if None in texts else "".join(filter(None, texts))


def _text_part(part: Any) -> str | None:
    """The text of one part of a content; None for other parts, such as images."""
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") in _TEXT_PARTS else None
    return part if isinstance(part, str) else None


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    calls = _parsed(calls, f"the field 'tool_calls' of message {number}")
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
    tools = _parsed(tools, "the field 'tools'") if not isinstance(tools, str) or tools.strip() else None
    if not tools:
        return None
    if isinstance(tools, list):
        try:
            tools = [
                _schema(function_of(json.loads(tool) if isinstance(tool, str) else tool)) for tool in tools
            ]
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


def _schema(value: Any) -> Any:
    """A tool without its null fields. Arrow gives every tool the union of all fields, and JSON written from it keeps them. In
    a schema, null is meaningful for a few keywords only."""
    if isinstance(value, dict):
        # Names below `properties` are parameters, not keywords.
        given = {
            k: {name: v for name, v in inner.items() if v is not None}
            if k == "properties" and isinstance(inner, dict)
            else inner
            for k, inner in value.items()
        }
        return {k: _schema(v) for k, v in given.items() if v is not None or k in _NULLABLE}
    if isinstance(value, list):
        return [_schema(inner) for inner in value]
    return value


def _kind(value: Any) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
