"""Runs as a table: columns, sort orders, and the fit to a narrow screen."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.operations.queries.runs import RunRow

STATUSES = tuple(output.STATUS_STYLE)
_DEFAULT_PROJECT = "default"


def _name(row: RunRow) -> str:
    """The name that a user gave. In a sweep the values that distinguish its runs come first."""
    project = "" if row.project == _DEFAULT_PROJECT else f"{row.project}/"
    if row.sweep and row.name.startswith(row.sweep):
        return f"{row.name[len(row.sweep) :].strip() or values(row)} · {project}{row.sweep}"
    forked = f" · {values(row)}" if row.changed and not row.sweep else ""
    return f"{project}{row.name}{forked}" if row.name or forked else project.rstrip("/")


def values(row: RunRow) -> str:
    """The values that distinguish the run in its sweep, or from its parent: `lr 0.001, seed 2`."""

    def shown(value: Any) -> str:
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            # Their names: whole entries, such as sources, would fill the screen.
            return " + ".join(str(entry.get("name", "…")) for entry in value)
        return value.rpartition("/")[2] if isinstance(value, str) else output.compact(value)

    def short(key: str) -> str:
        # The keys of a source are those of others, too.
        return key.removeprefix("data.sources.") if "data.sources." in key else key.rpartition(".")[2]

    return ", ".join(f"{short(key)} {shown(value)}" for key, value in row.changes.items())


def _took(row: RunRow) -> str:
    if row.eta_seconds is not None:
        return f"{output.duration(row.eta_seconds)} left"
    seconds = row.seconds
    return "" if seconds is None else output.duration(seconds)


# Column → text of a row's cell at a time (µs since the epoch).
_CELLS: dict[str, Callable[[RunRow, int], str]] = {
    "name": lambda row, now: _name(row),
    "run": lambda row, now: row.run_id,
    "status": lambda row, now: row.status,
    "step": lambda row, now: f"{row.step}/{row.planned_steps}",
    "loss": lambda row, now: output.loss(row.loss),
    "val": lambda row, now: output.loss(row.val_loss),
    "age": lambda row, now: output.age(now - row.submitted_at),
    "took": lambda row, now: _took(row),
    "try": lambda row, now: str(row.attempt or ""),
    "size": lambda row, now: output.size(row.bytes) if row.bytes else "",
    "submitted": lambda row, now: output.clock(row.submitted_at),
    "project": lambda row, now: row.project,
    "sweep": lambda row, now: row.sweep or "",
    "values": lambda row, now: values(row),
    "user": lambda row, now: row.user,
    "message": lambda row, now: row.message or "",
    "metrics": lambda row, now: row.metrics,
}
COLUMNS = tuple(_CELLS)
_USUAL = ("name", "run", "status", "step", "loss", "val", "age", "took", "try", "size")
_RIGHT = frozenset({"step", "loss", "val", "age", "took", "try", "size"})
# Columns that a narrow screen drops, in this order, if names would wrap at fewer characters than this.
_DROPPED = {"size": 36, "try": 36, "loss": 28, "took": 24, "step": 14}
# Users write these texts: they wrap, down to this width, and are never cut.
_WRAPPED, _NARROWEST = ("name", "values", "project", "sweep", "message", "metrics"), 10


def _number(text: str | None) -> tuple[bool, float]:
    value = math.nan if text is None else float(text)
    return math.isnan(value), value


# Best, newest, longest or furthest first; runs without the figure come last.
SORTS: dict[str, Callable[[RunRow], Any]] = {
    "age": lambda row: -row.submitted_at,
    "name": lambda row: _name(row).lower(),
    "status": lambda row: STATUSES.index(row.status),
    "step": lambda row: -row.step,
    "loss": lambda row: _number(row.loss),
    "val": lambda row: _number(row.val_loss),
    "took": lambda row: -(row.seconds or 0.0),
    "size": lambda row: -row.bytes,
}


def runs_table(
    rows: Sequence[RunRow], now: int, width: int, *, colour: bool, columns: Sequence[str] = ()
) -> Iterator[str]:
    """Runs as lines of at most `width` columns, in the given `columns`, else in those that fit.

    Formatted by hand: a rich table of a thousand rows takes a second.
    """
    names = list(columns) or list(_USUAL)
    cells = {name: _column(name, rows, now) for name in names}
    widths = {name: max(len(name), *map(len, cells[name])) for name in names}
    if not columns:
        _leave_out(names, cells, widths, width)
    wrapped = _narrow(names, widths, width)
    head, formatted = line_format({name: widths[name] for name in names}, _RIGHT, colour=colour)
    yield head
    for row, cell in zip(rows, zip(*(cells[name] for name in names), strict=True), strict=True):
        for line in _wrap(names, cell, widths) if wrapped else (cell,):
            yield formatted(line)
        # A run that has succeeded has one if it stopped early.
        if row.message and row.status in ("failed", "retrying", "succeeded") and not columns:
            text = output.printable(row.message)
            text = f"  {text}" if len(text) <= width - 2 else f"  {text[: width - 3]}…"
            colour_of = "green" if row.status == "succeeded" else "red"
            yield click.style(text, fg=colour_of) if colour else text


def _column(name: str, rows: Sequence[RunRow], now: int) -> list[str]:
    cell = _CELLS[name]
    texts = [cell(row, now) for row in rows]
    # One test for all rows is fast, and most columns pass it.
    return texts if "".join(texts).isprintable() else [output.printable(text) for text in texts]


def _total(names: Sequence[str], widths: dict[str, int]) -> int:
    return sum(widths[name] + 2 for name in names) - 2


def _leave_out(names: list[str], cells: dict[str, list[str]], widths: dict[str, int], width: int) -> None:
    """Drop empty columns, then those that matter least while a name would wrap."""
    for name in ("name", "loss", "val", "took", "try", "size"):
        if not any(cells[name]):
            names.remove(name)
    for name, least in _DROPPED.items():
        too_wide = _total(names, widths) - width
        if too_wide > 0 and name in names and ("name" not in names or widths["name"] - too_wide < least):
            names.remove(name)


def _narrow(names: Sequence[str], widths: dict[str, int], width: int) -> bool:
    """Narrow the widest text columns until a line fits. Returns whether anything has to wrap."""
    before = dict(widths)
    while (too_wide := _total(names, widths) - width) > 0:
        widest = max((name for name in names if name in _WRAPPED), key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _NARROWEST:
            break
        widths[widest] = max(_NARROWEST, widths[widest] - too_wide)
    return widths != before


def _wrap(names: Sequence[str], cell: Sequence[str], widths: dict[str, int]) -> Iterator[tuple[str, ...]]:
    parts = [
        textwrap.wrap(text, widths[name], break_on_hyphens=False) if len(text) > widths[name] else [text]
        for name, text in zip(names, cell, strict=True)
    ]
    for number in range(max(map(len, parts))):
        yield tuple(part[number] if number < len(part) else "" for part in parts)


def line_format(
    widths: Mapping[str, int], right: Collection[str], *, colour: bool
) -> tuple[str, Callable[[Sequence[str]], str]]:
    """The head of a plain table, and a function that formats a row. `widths` has the columns in their order."""
    template = "  ".join(f"{{:{'>' if name in right else '<'}{width}}}" for name, width in widths.items())
    head = template.format(*widths).rstrip()
    if not colour:
        return head, lambda cells: template.format(*cells).rstrip()

    def coloured(cells: Sequence[str]) -> str:
        padded = (
            output.styled(name, cell.rjust(width) if name in right else cell.ljust(width))
            for (name, width), cell in zip(widths.items(), cells, strict=True)
        )
        return "  ".join(padded).rstrip()

    return click.style(head, dim=True), coloured


def row_json(row: RunRow) -> dict[str, Any]:
    """A run as JSON values."""
    import msgspec

    fields = msgspec.structs.asdict(row)
    del fields["metrics"]
    return fields | {
        "submitted_at": output.iso(row.submitted_at),
        "started_at": output.iso(row.started_at),
        "ended_at": output.iso(row.ended_at),
        "loss": output.number(row.loss),
        "val_loss": output.number(row.val_loss),
        "eta_seconds": row.eta_seconds,
        "changed": msgspec.Raw(row.changed.encode()) if row.changed else {},
    }
