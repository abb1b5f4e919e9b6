"""The chat template, date and arguments that rendered the training data. Samples, answers and exports use the same."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec

# The default date of `strftime_now`, which is also the fallback of Llama 3's template. It is constant, so that the same
# chats give the same tokens on every day.
DEFAULT_DATE = "2024-07-26"


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """The rendering options besides the model folder and the messages.

    `text` is a template that replaces the model folder's. Otherwise `name` selects one of the folder's named templates;
    without a name transformers' rule applies: `tool_use` for chats with tools if it exists, else `default`. `date`
    (YYYY-MM-DD) is the current date for the template. `arguments` are further template variables.
    """

    text: str | None = None
    name: str | None = None
    date: str = DEFAULT_DATE
    arguments: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Raises ValueError if `date` is not a date."""
        dt.date.fromisoformat(self.date)
