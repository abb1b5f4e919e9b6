"""Reads Anthropic's form of messages and tools, in which tool calls, results and thinking are blocks of a content."""

from typing import Any

_BLOCKS = frozenset({"tool_use", "tool_result", "thinking"})


def without_blocks(message: Any) -> list[Any]:
    """A message with such blocks as messages with `tool_calls`, `reasoning_content`, and the role tool for results; any other
    message alone and unchanged."""
    content = message.get("content") if isinstance(message, dict) else None
    blocks: dict[Any, list[Any]] = {}
    for block in content if isinstance(content, list) else []:
        kind = block.get("type") if isinstance(block, dict) else None
        blocks.setdefault(kind if kind in _BLOCKS else None, []).append(block)
    if blocks.keys() <= {None}:
        return [message]
    results = [
        {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content") or ""}
        for block in blocks.get("tool_result", ())
    ]
    calls = [
        {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input")}}
        for block in blocks.get("tool_use", ())
    ]
    rest = message | {"content": blocks.get(None, [])}
    if calls:
        rest["tool_calls"] = calls
    if thoughts := blocks.get("thinking"):
        rest["reasoning_content"] = "\n".join(str(block.get("thinking")) for block in thoughts)
    return results + ([rest] if blocks.keys() - {"tool_result"} else [])


def function_of(tool: Any) -> Any:
    """A tool with an `input_schema` as a function with `parameters`; any other tool unchanged."""
    if not isinstance(tool, dict) or "input_schema" not in tool or "function" in tool:
        return tool
    function = {"name": tool.get("name"), "description": tool.get("description") or ""}
    return {"type": "function", "function": function | {"parameters": tool["input_schema"]}}
