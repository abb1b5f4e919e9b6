"""Formats of times, durations, numbers and JSON; printing of errors, warnings and notes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec

from sftd.domain.errors import Problem, Refused, SftdError
from sftd.domain.text.printable import escaped
from sftd.domain.text.printable import printable as printable
from sftd.domain.text.words import changes as changes
from sftd.domain.text.words import loss as loss
from sftd.domain.text.words import memory as memory
from sftd.domain.text.words import size as size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sftd.domain.log.events import Event

_NO_EDGE = 10_000
INTERRUPTION = "sftd.interruption"
# UTC, without a zone for speed: `ls --json` formats ten thousand times.
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001
STATUS_STYLE = {
    "queued": "cyan",
    "retrying": "yellow",
    "held": "yellow",
    "starting": "blue",
    "running": "bold blue",
    "stopping": "yellow",
    "paused": "yellow",
    "succeeded": "bold green",
    "failed": "bold red",
    "cancelled": "magenta",
}


def console(*, stderr: bool = False) -> Console:
    """A console for output that people read."""
    from sftd.cli.terminal import border

    stream = sys.stderr if stderr else sys.stdout
    if "utf" not in (stream.encoding or "utf").lower() and hasattr(stream, "reconfigure"):
        # If the locale lacks bars and arrows, print question marks instead of failing.
        stream.reconfigure(errors="replace")
    # Do not wrap lines in a pipe: they could not be searched.
    has_width = stream.isatty() or "COLUMNS" in os.environ
    return border.console(stderr=stderr, width=None if has_width else _NO_EDGE)


def print_facts(out: Console, facts: list[tuple[str, Text]]) -> None:
    """Print names and values in two columns. A value with a word longer than its column, such as a path, is left for the
    terminal to wrap, so that it can be copied."""
    from rich.table import Table
    from rich.text import Text

    label = max(len(name) for name, _ in facts)
    for name, value in facts:
        if max(map(len, value.plain.split()), default=0) > out.width - label - 2:
            out.print(Text.assemble((f"{name:<{label}}  ", "dim"), value), soft_wrap=True)
            continue
        line = Table.grid(padding=(0, 2))
        line.add_column(style="dim", no_wrap=True, width=label)
        line.add_column(overflow="fold")
        line.add_row(name, value)
        out.print(line)


def table(*names: str, right: Iterable[str] = (), dim: Iterable[str] = (), fold: Iterable[str] = ()) -> Table:
    """An empty table with these columns. On a narrow screen those in `fold` wrap, and no other."""
    from rich import box
    from rich.table import Column, Table

    columns = [
        Column(
            name,
            justify="right" if name in right else "left",
            style="dim" if name in dim else "",
            no_wrap=name not in fold,
            overflow="fold" if name in fold else "ellipsis",
        )
        for name in names
    ]
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def layout(sizes: Mapping[str, int]) -> str:
    """`TP2 DP4`: the sizes of a layout above 1; `1 rank` if there is none, empty for an unknown layout."""
    return " ".join(f"{name.upper()}{size}" for name, size in sizes.items() if size > 1) or "1 rank" * bool(
        sizes
    )


def status_text(status: str) -> Text:
    """A status in its colour."""
    from rich.text import Text

    return Text(status, STATUS_STYLE.get(status, ""))


def iso(micros: int | None) -> str | None:
    """µs since the epoch → ISO 8601 in UTC with microseconds."""
    if micros is None:
        return None
    return (_EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds") + "Z"


def clock(micros: int) -> str:
    """µs since the epoch → local date and time, to the second."""
    return datetime.fromtimestamp(micros / 1e6).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """Seconds → `45s`, `3m20s`, `2h05m`, `4d03h`. `?` for a negative span: the clock was set back."""
    if seconds is None:
        return ""
    if seconds < -0.5:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, secs = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{secs:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"


def age(micros: int) -> str:
    """µs → the largest unit alone: `45s`, `12m`, `3h`, `4d`, `7w`. A time in the future is `0s`."""
    seconds = max(0, micros) // 1_000_000
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m"
    if seconds < 86_400:
        return f"{seconds // 3600}h"
    # 9 days, not one week; 2 weeks, not 14 days.
    return f"{seconds // 86_400}d" if seconds < 14 * 86_400 else f"{seconds // 604_800}w"


def number(text: str | None) -> float | str | None:
    """A number that a view stores as text. One that is not finite stays text: JSON has no such numbers."""
    return float(text) if text is not None and text[-1].isdigit() else text


def compact(value: Any) -> str:
    """A setting's value as a person writes it: `1e-05`, `true`, `[1,2]`."""
    return msgspec.json.encode(value).decode() if not isinstance(value, float) else f"{value:g}"


def summary(event: Event) -> str:
    """An event's summary, without control characters."""
    return printable(event.summary())


def json_line(value: Any) -> str:
    """A value as one line of JSON, without control characters; a number that is not finite becomes its name."""
    from sftd.domain.log.codec import finite

    return json_text(msgspec.json.encode(finite(value)))


def json_text(encoded: bytes) -> str:
    """JSON with control characters escaped; its values do not change."""
    return escaped(encoded.decode())


def print_error(error: SftdError) -> None:
    """Print an error on stderr."""
    out = console(stderr=True)
    if isinstance(error, Refused):
        count = len(error.problems)
        first = "[bold red]refused[/]: "
        if count != 1:
            out.print(f"{first}{count} problems; nothing was written")
            first = "  "
        for problem in error.problems:
            out.print(f"{first}[bold]{escape(problem.where)}[/]: {escape(problem.what)}", soft_wrap=True)
            if problem.fix:
                out.print(f"    fix: {escape(problem.fix)}", soft_wrap=True)
    else:
        out.print(f"[bold red]sftd[/]: {escape(str(error))}", soft_wrap=True)


def require_folder(where: str, path: str) -> None:
    """Check that the folder of `path` exists and is writable. Raises `Refused`."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise Refused(Problem(where, f"{folder} {what}", f"make it: mkdir -p {shlex.quote(folder)}"))
    if not os.access(folder, os.W_OK):
        raise Refused(Problem(where, f"{folder} is not writable", "name a folder in which you may write"))


def escape(text: str) -> str:
    """A text with rich's markup escaped."""
    from rich import markup

    return markup.escape(text)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    console(stderr=True).print(f"[yellow]warning[/]: {escape(text)}", soft_wrap=True)


def warn_all(warnings: Iterable[Problem]) -> None:
    """Print warnings on stderr, where they do not disturb scripts."""
    for warning in warnings:
        warn(str(warning))


def note(text: str) -> None:
    """Print a remark on stderr: stdout is for scripts."""
    click.echo(text, err=True)


def when_interrupted(text: str) -> None:
    """Set the sentence that the command's group prints after Ctrl-C."""
    if (command := click.get_current_context(silent=True)) is not None:
        command.meta[INTERRUPTION] = text


def width() -> int:
    """Columns of the terminal. COLUMNS takes precedence; without a terminal 120."""
    return shutil.get_terminal_size((120, 24)).columns


def styled(column: str, text: str) -> str:
    """A cell of a plain table in its colour."""
    if column == "run":
        return click.style(text, bold=True)
    if column == "status":
        style = STATUS_STYLE.get(text.strip(), "")
        return click.style(text, fg=style.removeprefix("bold ") or None, bold=style.startswith("bold"))
    return text


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()
