"""`sftd queue`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.run_table import line_format

if TYPE_CHECKING:
    from sftd.operations.queries.queue import QueueRow


@click.command("queue")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def queue_command(as_json: bool) -> None:
    """List running runs, then waiting runs in start order, and what each waits for.

    Start times are estimated from the pace of the runs ahead. Until these have trained a step, a start is unknown.

    \b
    Example:
      sftd queue
      sftd queue --json | jq -r '.[] | select(.kind == "devices") | .run_id'
    """
    from sftd.domain.queue.order import Limits
    from sftd.operations.queries import queue

    settings = app.read_settings()
    store = app.open_store(settings)
    context = app.context()
    limits = Limits(settings.user_limit, settings.project_limit)
    rows = queue.list_queue(store, context, limits, settings.silent_micros)
    if as_json:
        click.echo(output.json_line([queue_json(row) for row in rows]))
    elif not rows:
        click.echo("Nothing runs and nothing waits. `sftd submit CONFIG` queues a run.")
    else:
        click.echo("\n".join(_table(rows, context.now(), output.width(), colour=output.is_terminal())))


def queue_json(row: QueueRow) -> dict[str, Any]:
    """A row of the queue as JSON values."""
    import msgspec

    times = {name: output.iso(getattr(row, name)) for name in ("not_before", "starts_at")}
    values = msgspec.structs.asdict(row) | times | {"job": _job(row)}
    del values["launcher"]
    return values


def _job(row: QueueRow) -> str:
    from sftd.domain.spec.launch.launchers import kind_of

    return kind_of(row.launcher).describe(row.job) if row.job else ""


_COLUMNS = ("run", "status", "prio", "dev", "starts", "waits for")
_RIGHT = frozenset({"prio", "dev", "starts"})


def _table(found: list[QueueRow], now: int, width: int, *, colour: bool) -> Iterator[str]:
    """Runs as lines of at most `width` columns; a narrow screen truncates the last column."""
    rows = [_cells(row, now) for row in found]
    widths = {name: max(len(name), *(len(row[n]) for row in rows)) for n, name in enumerate(_COLUMNS[:-1])}
    last = max(9, width - sum(size + 2 for size in widths.values()))
    head, formatted = line_format(widths | {_COLUMNS[-1]: last}, _RIGHT, colour=colour)
    yield head
    for *cells, what in rows:
        yield formatted((*cells, what if len(what) <= last else f"{what[: last - 1]}…"))


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
            # Such as a job that cannot be observed, or cannot be cancelled now.
            what = f"{_job(row)}; {what}"
        what = f"({what})"
        if not row.observed:
            what = "(its daemon is not observed)"
    return row.run_id, row.status, str(row.priority), str(row.devices), starts, what
