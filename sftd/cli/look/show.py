"""`sftd show`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.run_details import figure_facts, history_table, print_state, state_json, time_facts
from sftd.cli.terminal.run_table import SORTS, STATUSES, row_json, runs_table

if TYPE_CHECKING:
    from sftd.domain.log.events import StepCompleted, ValidationCompleted
    from sftd.operations.queries.runs import RunRow

# Events of steps: `sftd replay` shows these.
_LEFT_OUT = {
    "StepCompleted",
    "ValidationCompleted",
    "SampleGenerated",
    "SystemSampled",
    "DataBound",
    "WeightsDigested",
    "CheckpointStarted",
    "CheckpointPublished",
    "CheckpointDeleted",
}


@click.command("show")
@click.argument("run", metavar="RUN|SWEEP")
@click.option(
    "--config", "as_config", is_flag=True, help="Print the run's config as YAML, ready to be submitted again."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the run's whole state as JSON; of a sweep, an array of runs.",
)
def show_command(run: str, as_config: bool, as_json: bool) -> None:
    """Show one run: status, progress, validation, where its time went, attempts, checkpoints. Or the runs of a sweep, the
    lowest validation loss first.

    RUN is an id, a unique beginning of one, or a name (NAME or PROJECT/NAME), of which the newest run is shown.

    \b
    Example:
      sftd show brave-otter-3f2a
      sftd show geo-bot/baseline
      sftd show sweep-3aea38
      sftd show brave-otter-3f2a --config > again.yaml
    """

    from sftd.cli.plan.view import outcome_facts
    from sftd.domain.log.events import EVENT_TYPES
    from sftd.operations.queries import board, plan, resolve, runs

    store = app.open_store(app.read_settings())
    if not as_config and resolve.is_sweep(store, run):
        rows = runs.list_runs(store, runs.Filter(sweep=run))
        _show_sweep(run, sorted(rows, key=SORTS["val"]), as_json)
        return
    found = runs.find_run(store, app.resolve_run(store, run))
    if as_config:
        from sftd.cli.submit.show_config import as_yaml

        click.echo(as_yaml(found))
        return
    ledger = runs.goodput(store, found.run_id, app.context().now())
    planned = plan.outcome(store, found, ledger)
    step, validation = runs.last_measured(store, found)
    if as_json:
        more = {
            "goodput": ledger.as_json(),
            "planned": planned.as_json() if planned else None,
            "figures": {"step": _figures_json(step), "validation": _figures_json(validation)},
        }
        click.echo(output.json_line(state_json(found) | more))
        return
    attempt_events = runs.run_events(
        store, found.run_id, types=tuple(name for name in EVENT_TYPES if name not in _LEFT_OUT)
    )
    out = output.console()
    speed = board.tokens_per_second(store, found.run_id)
    more_facts = (*figure_facts(step, validation), *time_facts(ledger), *outcome_facts(planned))
    print_state(found, attempt_events, more_facts, speed)
    out.print()
    out.print(history_table(attempt_events))


def _figures_json(event: StepCompleted | ValidationCompleted | None) -> dict[str, Any] | None:
    import msgspec

    names = ("step", "token_accuracy", "entropy", "sources")
    return None if event is None else {name: msgspec.to_builtins(getattr(event, name)) for name in names}


def _show_sweep(sweep: str, rows: list[RunRow], as_json: bool) -> None:
    """Print the runs of a sweep as a leaderboard."""
    if as_json:
        click.echo(output.json_line([row_json(row) for row in rows]))
        return
    statuses = Counter(row.status for row in rows)
    counts = ", ".join(f"{statuses[name]} {name}" for name in STATUSES if statuses[name])
    click.echo(f"{sweep}: {len(rows)} runs of project {rows[0].project}, by {rows[0].user}: {counts}\n")
    columns = ("values", "val", "loss", "step", "status", "run", "took")
    now = app.context().now()
    table = runs_table(rows, now, output.width(), colour=output.is_terminal(), columns=columns)
    click.echo("\n".join(table))
    output.note(f"\n`sftd compare {sweep}` shows what differs and plots the losses.")
