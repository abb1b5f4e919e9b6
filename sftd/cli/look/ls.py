"""`sftd ls`."""

from __future__ import annotations

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.run_table import COLUMNS, SORTS, STATUSES, row_json, runs_table

# Seconds.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.command("ls")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option(
    "-s", "--status", "statuses", multiple=True, type=click.Choice(STATUSES), help="Only these; repeatable."
)
@click.option("-p", "--project", help="Only runs of this project.")
@click.option("--name", help="Only runs whose name (NAME or PROJECT/NAME) matches this pattern.")
@click.option("--sweep", help="Only runs of this sweep.")
@click.option(
    "--since", metavar="TIME", help="Only runs submitted since: 30m, 2h, 3d, 1w ago, or 2026-01-31."
)
@click.option(
    "--sort",
    type=click.Choice(tuple(SORTS)),
    default="age",
    show_default=True,
    help="Order: newest, lowest loss, furthest or longest first.",
)
@click.option("--columns", metavar="COLUMN,…", help=f"Only these columns, of {', '.join(COLUMNS)}.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Maximum number of runs to show.")
@click.option("--removed", is_flag=True, help="List the runs that `sftd rm` removed instead.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def ls_command(
    patterns: tuple[str, ...],
    statuses: tuple[str, ...],
    project: str | None,
    name: str | None,
    sweep: str | None,
    since: str | None,
    sort: str,
    columns: str | None,
    limit: int | None,
    removed: bool,
    as_json: bool,
) -> None:
    """List runs, newest first. PATTERN is the beginning of an id, a part of a name, or a sweep; with `*` and `?` it must match
    a whole id, name or sweep.

    A narrow terminal leaves out columns and wraps names.

    \b
    Example:
      sftd ls -s running -s queued
      sftd ls 'geo*' --since 2d --sort val
      sftd ls --columns name,val,took
      sftd ls --json | jq -r '.[] | select(.status == "failed") | .run_id'
    """
    import msgspec

    from sftd.operations.queries import runs
    from sftd.operations.queries.runs import Filter

    chosen = _columns(columns)
    now = app.context().now()
    settings = app.read_settings()
    store = app.open_store(settings)
    wanted = Filter(
        patterns=patterns,
        statuses=statuses,
        project=project,
        name=name,
        sweep=sweep,
        since=_since(since, now),
        removed=removed,
    )
    rows = runs.list_runs(
        store, wanted, limit=limit if sort == "age" else None, with_metrics="metrics" in chosen
    )
    if sort != "age":
        rows = sorted(rows, key=SORTS[sort])[:limit]
    if as_json:
        # Faster than `json_line`: numbers that are not finite are texts here already.
        click.echo(output.json_text(msgspec.json.encode([row_json(row) for row in rows])))
    elif not rows and (count := runs.count_runs(store)):
        click.echo(
            f"No runs with these filters; there {'are' if count > 1 else 'is'} {count:,} without them."
        )
    elif not rows:
        click.echo("No runs. `sftd submit CONFIG` queues one; `sftd demo` shows all of it.")
    else:
        # One call: ten thousand take a tenth of a second.
        table = runs_table(rows, now, output.width(), colour=output.is_terminal(), columns=chosen)
        click.echo("\n".join(table))
        if any(row.ended_at is None for row in rows):
            app.note_missing_daemon(settings, "this may be out of date")


def _columns(text: str | None) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",")) if text is not None else ()
    if unknown := [name for name in chosen if name not in COLUMNS]:
        what = f"{unknown[0]!r} is not a column; choose from {', '.join(COLUMNS)}"
        raise click.BadParameter(what, param_hint="--columns")
    return chosen


def _since(text: str | None, now: int) -> int | None:
    """A time or an age → µs since the epoch."""
    from datetime import datetime

    if text is None:
        return None
    count, unit = text[:-1], text[-1:]
    if count.isdecimal() and len(count) < 10 and unit in _UNITS:
        return now - int(count) * _UNITS[unit] * 1_000_000
    try:
        return round(datetime.fromisoformat(text).astimezone().timestamp() * 1_000_000)
    except (ValueError, OverflowError):
        what = f"{text!r} is neither a time such as 2026-01-31T09:30 nor an age such as 30m, 2h, 3d or 1w"
        raise click.BadParameter(what, param_hint="--since") from None
