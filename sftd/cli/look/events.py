"""`sftd events`."""

from __future__ import annotations

import time
from typing import Any

import click

from sftd.cli import app
from sftd.cli.terminal import output

_POLL_SECONDS = 0.3
_PAGE = 1000


@click.command("events")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended.")
@click.option("-t", "--type", "types", multiple=True, help="Only events of this type; repeatable.")
@click.option(
    "--json", "as_json", is_flag=True, help="One event a line, with the fields of the events table."
)
def events_command(run: str, follow: bool, types: tuple[str, ...], as_json: bool) -> None:
    """Print a run's events in order.

    \b
    Example:
      sftd events -f brave-otter
      sftd events brave-otter --json -t StepCompleted | jq .payload.loss
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.log.events import EVENT_TYPES

    for name in types:
        if name not in EVENT_TYPES:
            raise Refused(Problem("--type", f"no event is called {name}", "one of " + ", ".join(EVENT_TYPES)))
    store = app.open_store(app.read_settings())
    run_id = app.resolve_run(store, run)
    version = 0
    if follow:
        output.when_interrupted(f"{run_id} continues.")
    while True:
        # Checked before reading: if the run has ended, this round reads its last events.
        ended = _has_ended(store, run_id)
        version = _print_events(store, run_id, version, types, as_json)
        if not follow or ended:
            return
        time.sleep(_POLL_SECONDS)


def _has_ended(store: Any, run_id: str) -> bool:
    from sftd.domain.run.state import ENDED
    from sftd.operations.queries import runs

    return runs.find_run(store, run_id).status in ENDED


def _print_events(store: Any, run_id: str, version: int, types: tuple[str, ...], as_json: bool) -> int:
    """Print the events after `version`, a page at a time, so that no read transaction is open while a pager waits. Returns
    the last version."""
    from sftd.operations.queries import runs

    while True:
        if as_json:
            rows = runs.raw_events(store, run_id, version, types, _PAGE)
            for row in rows:
                click.echo(_json_event(row))
            read, last = len(rows), rows[-1]["version"] if rows else version
        else:
            events = runs.run_events(store, run_id, version, types, _PAGE)
            for r in events:
                attempt = f"#{r.attempt}" if r.attempt else ""
                click.echo(
                    f"{output.clock(r.occurred_at)}  {attempt:>3}  {r.type:<20} {output.summary(r.event)}"
                )
            read, last = len(events), events[-1].version if events else version
        version = last
        if read < _PAGE:
            return version


def _json_event(row: dict[str, Any]) -> str:
    import msgspec

    times = {name: output.iso(row[name]) for name in ("occurred_at", "recorded_at")}
    return output.json_line({**row, **times, "payload": msgspec.Raw(row["payload"].encode())})
