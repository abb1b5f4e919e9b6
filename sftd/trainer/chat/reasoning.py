"""Reasoning whose opening tag is in the generation prompt, so that the model writes only the rest."""

import re
from collections.abc import Mapping
from typing import Any

# Fields of a message with its reasoning, separate from its content.
REASONING = ("reasoning_content", "reasoning", "thinking")
_OPENING_TAG = re.compile(r"<([A-Za-z][\w-]*)>(\s*)\Z")


def opened_tag(opening: str) -> str | None:
    """The tag at the end of a generation prompt, such as `think`; None if there is none."""
    found = _OPENING_TAG.search(opening)
    return found[1] if found else None


def as_written(message: Mapping[str, Any], opening: str) -> str | None:
    """The model's output for an answer after a generation prompt that ends with `opening`: the reasoning after its opening
    tag, the closing tag and the rest. None when the prompt opens no reasoning, the answer has none, or the answer calls
    tools, whose format depends on the template."""
    found = _OPENING_TAG.search(opening)
    if found is None or message.get("tool_calls"):
        return None
    tag, blank = found.groups()
    content = str(message.get("content") or "")
    reasoning = next((message[field] for field in REASONING if message.get(field)), None)
    if f"</{tag}>" in content:
        rest = content.lstrip()
        return rest.removeprefix(f"<{tag}>").removeprefix(blank) if rest.startswith(f"<{tag}>") else content
    if isinstance(reasoning, str):
        return reasoning.strip("\n") + f"\n</{tag}>\n\n" + content.lstrip("\n")
    return None
