"""Which chat template the training data was rendered with, and with what: samples, answers and exports use the same."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec

# What `strftime_now` gives where no date was chosen: the date that Llama 3's template writes where it has no clock. A
# constant, so that the same chats give the same tokens on every day.
DEFAULT_DATE = "2024-07-26"


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """The choice that a text depends on beside the model folder and the messages.

    `text` is a template given instead of the model folder's. Otherwise `name` selects one of the folder's named
    templates; without a name transformers' rule holds: `tool_use` for chats with tools where there is one, else `default`.
    `date` (YYYY-MM-DD) is what a template that asks for the current date gets. `arguments` are further variables of the
    template.
    """

    text: str | None = None
    name: str | None = None
    date: str = DEFAULT_DATE
    arguments: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Raises ValueError for a date that is not one."""
        dt.date.fromisoformat(self.date)
