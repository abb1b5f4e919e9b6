"""`sftd eval`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.run.state import EvaluationState, Run
    from sftd.operations.queries.evaluations import Answers
    from sftd.settings import Settings
    from sftd.store.database.engine import Store

_POLL_SECONDS = 0.3
_SHOWN = 10


@click.command("eval")
@click.argument("run")
@click.argument("name", required=False)
@click.option("--step", type=click.IntRange(min=1), help="Use this step's checkpoint; the last if not given.")
@click.option("--list", "as_list", is_flag=True, help="List the run's evaluations and their results.")
@click.option(
    "--against", metavar="STEP|RUN", help="Compare the answers with those at STEP, or with those of RUN."
)
@click.option("--cancel", is_flag=True, help="Cancel evaluations that wait or run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval_command(
    run: str,
    name: str | None,
    step: int | None,
    as_list: bool,
    against: str | None,
    cancel: bool,
    as_json: bool,
) -> None:
    """Evaluate a checkpoint of RUN: all evaluations of its config, or the one called NAME.

    A daemon runs evaluations when no run needs the devices. The command waits for the results; after Ctrl-C the evaluations
    stay queued. Exit code 1 if one fails.

    --against prints the answers that became better or worse, from the files that evaluations with questions write.

    \b
    Example:
      sftd eval brave-otter
      sftd eval brave-otter arithmetic --step 100
      sftd eval brave-otter --list
      sftd eval brave-otter arithmetic --against 100
    """
    from sftd.operations.commands import evaluate
    from sftd.operations.queries import resolve
    from sftd.operations.queries import runs as run_queries

    if as_list + cancel + (against is not None) > 1:
        raise click.UsageError("Give only one of --list, --cancel and --against.")
    settings = app.read_settings()
    store = app.open_store(settings)
    if as_list or against is not None:
        found = run_queries.find_run(store, app.resolve_run(store, run))
        if as_list:
            chosen = [x for x in found.evaluations if name in (None, x.name) and step in (None, x.step)]
            _list(store, settings, found, chosen, as_json=as_json)
        else:
            _compare(store, found, name, step, against or "", as_json=as_json)
        return
    run_id = resolve.one_to_change(store, run)
    if cancel:
        gone = evaluate.cancel(store, app.context(), run_id, step, name, app.user_name())
        found = run_queries.find_run(store, run_id)
        if as_json:
            click.echo(output.json_line(gone))
        else:
            click.echo(f"{found.run_id}: {counted(len(gone), 'evaluation')} cancelled")
        return
    asked = evaluate.request(store, app.context(), run_id, step, name, app.user_name())
    app.note_missing_daemon(settings, "the evaluation stays queued")
    ended = _wait(store, settings, run_id, asked) if _has_daemon(settings) else asked
    _list(store, settings, run_queries.find_run(store, run_id), ended, as_json=as_json)
    if any(x.status == "failed" for x in ended):
        raise SystemExit(1)


def _has_daemon(settings: Settings) -> bool:
    """Whether a daemon may run the evaluation. On a database server, one of another home may."""
    from sftd.daemon import lock

    return not settings.database_url.startswith("sqlite") or lock.holder(settings.daemon_lock) is not None


def _wait(
    store: Store, settings: Settings, run_id: str, asked: list[EvaluationState]
) -> list[EvaluationState]:
    from sftd.cli.terminal.progress import spinner
    from sftd.operations.queries import evaluations
    from sftd.operations.queries import runs as run_queries

    output.when_interrupted(f"The evaluation stays queued; `sftd eval {run_id} --list` shows it.")
    keys = [(x.name, x.step) for x in asked]
    with spinner(f"{run_id}: evaluating") as show:
        while True:
            run = run_queries.find_run(store, run_id)
            now = [x for x in run.evaluations if (x.name, x.step) in keys]
            if not (left := [x for x in now if x.is_open]):
                return now
            first = next((x for x in left if x.status == "running"), left[0])
            how = f"running, {output.duration((app.context().now() - first.since) / 1e6)}"
            if first.status == "pending":
                how = evaluations.what_it_waits_for(store, app.context(), run, settings.silent_micros)
            stage = "running" if first.status == "running" else how
            where = f"{first.name}, step {first.step}"
            show(f"{where}: {how}", f"{where}: {stage}")
            time.sleep(_POLL_SECONDS)


def _list(
    store: Store, settings: Settings, run: Run, chosen: list[EvaluationState], *, as_json: bool
) -> None:
    from rich.text import Text

    from sftd.operations.queries import evaluations

    if as_json:
        click.echo(output.json_line([_as_json(x) for x in chosen]))
        return
    if not chosen:
        click.echo(f"{run.run_id} has no evaluation{' yet' if run.spec.evaluation else ' in its config'}.")
        return
    table = output.table(
        "step", "evaluation", "status", "result", "took", right=["step", "took"], fold=["result"]
    )
    for x in chosen:
        result = metrics_text(x)
        if x.status == "pending":
            waits = evaluations.what_it_waits_for(store, app.context(), run, settings.silent_micros)
            result = "; ".join(filter(None, [waits, x.message]))
        elif x.status == "failed":
            result = x.message
        took = output.duration(x.seconds) if x.status == "done" else ""
        style = {"done": "green", "failed": "red", "running": "cyan"}.get(x.status, "")
        table.add_row(str(x.step), x.name, Text(x.status, style), Text(output.printable(result)), took)
    output.console().print(table)


def metrics_text(x: EvaluationState) -> str:
    """The metrics of a result in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in x.metrics.items())


def _as_json(x: EvaluationState) -> dict[str, Any]:
    import msgspec

    hidden = ("started", "tries")
    fields = {key: value for key, value in msgspec.structs.asdict(x).items() if key not in hidden}
    return fields | {"since": output.iso(x.since)}


def _compare(
    store: Store, run: Run, name: str | None, step: int | None, against: str, *, as_json: bool
) -> None:
    import msgspec

    from sftd.operations.queries import evaluations
    from sftd.operations.queries import runs as run_queries

    if name is None:
        names = [evaluation.name for evaluation in run.spec.evaluation]
        if len(names) != 1:
            raise click.UsageError("--against needs the NAME of an evaluation.")
        name = names[0]
    ours = evaluations.last_done(run, name, step)
    if against.isdecimal() and len(against) < 19:
        other, theirs = run, evaluations.last_done(run, name, int(against))
    else:
        other = run_queries.find_run(store, app.resolve_run(store, against))
        theirs = evaluations.last_done(other, name, None)
    rows = evaluations.side_by_side(ours, theirs)
    if as_json:
        click.echo(output.json_line([msgspec.structs.asdict(row) for row in rows]))
        return
    labels = [f"{run.run_id}, step {ours.step}", f"{other.run_id}, step {theirs.step}"]
    _print_answers(rows, labels)
    better, worse = sum(row.change > 0 for row in rows), sum(row.change < 0 for row in rows)
    click.echo(
        f"{name}: {counted(len(rows), 'question')}, {better} better and {worse} worse at {labels[0]} than at {labels[1]}"
    )


def _print_answers(rows: list[Answers], labels: list[str]) -> None:
    """Print the answers whose scores differ, the largest difference first."""
    changed = sorted((row for row in rows if row.change), key=lambda row: (-abs(row.change), row.question))
    width = max(map(len, labels))
    for row in changed[:_SHOWN]:
        click.echo(click.style(f"{row.question + 1}  {_line(row.prompt)}", bold=True))
        if row.reference:
            click.echo(f"   {'reference':<{width}}  {_line(' | '.join(row.reference))}")
        for label, text, is_best in (
            (labels[0], row.ours, row.change > 0),
            (labels[1], row.theirs, row.change < 0),
        ):
            click.echo(f"   {label:<{width}}  " + click.style(_line(text), fg="green" if is_best else "red"))
    if len(changed) > _SHOWN:
        output.note(f"({len(changed) - _SHOWN} more differ; --json prints all)")


def _line(text: str) -> str:
    shown = output.printable(text)
    return shown if len(shown) <= 200 else f"{shown[:199]}…"
