"""What a terminal obeys, colours excepted, is removed from everything that a command prints: others write names and errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from sftd.domain.text.printable import harmless

if TYPE_CHECKING:
    from rich.console import Console


class Stream:
    """A text stream that passes on nothing that a terminal obeys, colours excepted."""

    def __init__(self, stream: IO[str]) -> None:
        # Rich's own proxies have their stream under this name, too.
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
    """A rich console of this width (None: the terminal's) that prints nothing of a text but what can be seen; its own styles and cursor movements remain."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    # Past the border: the console is clean by itself, and moves the cursor. Named here, because rich puts a proxy of its own
    # around sys.stdout while a spinner or a board is shown.
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
