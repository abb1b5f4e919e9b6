"""Removes control characters, except colours, from all output of a command: names and errors may come from other users."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from sftd.domain.text.printable import harmless

if TYPE_CHECKING:
    from rich.console import Console


class Stream:
    """A text stream that removes control characters, except colours."""

    def __init__(self, stream: IO[str]) -> None:
        # rich's own proxies use this name, too.
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self.rich_proxied_file.write(harmless(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Wrap stdout and stderr while the block runs."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def console(*, stderr: bool, width: int | None) -> Console:
    """A rich console of this width (None: the terminal's) that removes control characters from texts. Its own styles and
    cursor movements remain."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    # Bypass `Stream`: the console removes control characters itself, and must move the cursor. Unwrap proxies, because rich
    # puts its own around sys.stdout while it shows a spinner or a live screen.
    stream = sys.stderr if stderr else sys.stdout
    while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = inner

    class Clean(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                text = segment.text
                if segment.control or text.isprintable() or text == "\n":
                    yield segment
                else:
                    yield Segment(harmless(text).replace("\x1b", " "), segment.style)

    return Clean(file=stream, stderr=stderr, highlight=False, width=width)
