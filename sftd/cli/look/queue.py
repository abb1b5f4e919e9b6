"""`sftd queue`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.operations.queries.queue import QueueRow


@click.command("queue")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def queue_command(as_json: bool) -> None:
    """List the runs that run and those that wait, in the order in which they start, and what each waits for.

    A start is expected from the pace of the runs before it; where one of them has made no step yet, it is unknown.

    \b
    Example:
      sftd queue
      sftd queue --json | jq -r '.[] | select(.kind == "devices") | .run_id'
    """
    from sftd.domain.queue.order import Limits
    from sftd.operations.queries import queue as waiting

    settings = app.read_settings()
    store = app.open_store(settings)
    context = app.context()
    limits = Limits(settings.user_limit, settings.project_limit)
    rows = waiting.list_queue(store, context, limits, settings.silent_micros)
    if as_json:
        click.echo(output.json_line([as_values(row) for row in rows]))
    elif not rows:
        click.echo("Nothing runs and nothing waits. `sftd submit CONFIG` queues a run.")
    else:
        click.echo("\n".join(_table(rows, context.now(), output.width(), colour=output.is_terminal())))


def as_values(row: QueueRow) -> dict[str, Any]:
    """A line for scripts."""
    import msgspec

    times = {name: output.iso(getattr(row, name)) for name in ("not_before", "starts_at")}
    values = msgspec.structs.asdict(row) | times | {"job": _job(row)}
    del values["launcher"]
    return values


def _job(row: QueueRow) -> str:
    from sftd.domain.spec.launchers import kind_of

    return kind_of(row.launcher).describe(row.job) if row.job else ""


_COLUMNS = ("run", "status", "prio", "dev", "starts", "waits for")
_RIGHT = frozenset({"prio", "dev", "starts"})


def _table(rows: list[QueueRow], now: int, width: int, *, colour: bool) -> Iterator[str]:
    """Runs as lines of at most `width` columns; on a narrow screen the last column gives way."""
    cells = [dict(zip(_COLUMNS, _cells(row, now), strict=True)) for row in rows]
    widths = {name: max(len(name), *(len(cell[name]) for cell in cells)) for name in _COLUMNS}
    widths["waits for"] = max(9, width - sum(widths[name] + 2 for name in _COLUMNS[:-1]))

    def line(cell: dict[str, str], style: Callable[[str, str], str]) -> str:
        parts = []
        for name in _COLUMNS:
            text, size = cell[name], widths[name]
            if len(text) > size:
                text = text[: size - 1] + "…"
            parts.append(style(name, text.rjust(size) if name in _RIGHT else text.ljust(size)))
        return "  ".join(parts).rstrip()

    yield line({n: n for n in _COLUMNS}, lambda _, text: click.style(text, dim=True) if colour else text)
    for cell in cells:
        yield line(cell, lambda name, text: output.styled(name, text) if colour else text)


def _cells(row: QueueRow, now: int) -> tuple[str, ...]:
    if row.kind:
        starts = "unknown"
        if row.starts_at is not None:
            starts = "now" if row.starts_at <= now else f"~{output.duration((row.starts_at - now) / 1e6)}"
        what = row.waits_for
        if row.not_before is not None:
            what = f"its next try in {output.duration(max(0, row.not_before - now) / 1e6)}"
    else:
        starts = ""
        left = f", {output.duration(row.seconds_left)} left" if row.seconds_left is not None else ""
        what = f"step {row.step} of {row.planned_steps}{left}"
        if row.job and row.status == "starting":
            what = _job(row)
        elif row.job and not row.job.just_runs:
            # Such as one that cannot be observed, or that cannot be cancelled now.
            what = f"{_job(row)}; {what}"
        what = f"({what})"
        if not row.observed:
            what = "(its daemon is not observed)"
    return row.run_id, row.status, str(row.priority), str(row.devices), starts, what
