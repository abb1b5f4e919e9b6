"""The context of operations: on the time of the host, and on a clock that tests move."""

from __future__ import annotations

from sftd.operations.context import Context

CONTEXT = Context(actor="test")


class Clock:
    """A context whose time changes only when a test moves it."""

    def __init__(self) -> None:
        self.time = 1_000_000_000
        self.context = Context(actor="test", now=lambda: self.time)
