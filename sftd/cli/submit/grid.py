"""`sftd submit --grid`: a run for each combination of values."""

from __future__ import annotations

import os

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted
from sftd.settings import Settings


def submit(
    settings: Settings,
    config: str,
    overrides: tuple[str, ...],
    options: tuple[str, ...],
    after: tuple[str, ...],
    *,
    quiet: bool,
    strict: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Queue every point of a grid, or none, and print their ids."""
    from sftd.cli.plan.known_hosts import known_hosts
    from sftd.cli.submit.answers import queued_json
    from sftd.domain.errors import Refused
    from sftd.domain.spec.spec import spec_digest
    from sftd.domain.submit.facts import SubmitFacts
    from sftd.operations.commands.submit import Wish, check_after, submit_all
    from sftd.wire.spec import grid

    context = app.context()
    # Short, because the names of all its runs begin with it.
    name = f"sweep-{context.random(3).hex()}"
    known = SubmitFacts(hosts=known_hosts(settings))
    points = grid.points(config, overrides, grid.parse_grid(options), os.getcwd(), name, settings.home, known)
    texts = [", ".join(f"{key}={value}" for key, value in point.values.items()) for point in points]
    warnings = list(dict.fromkeys(w for point in points for w in point.warnings))
    if strict and warnings:
        raise Refused(warnings)
    if after and dry_run:
        check_after(app.open_store(settings), after)
    if not as_json:
        output.warn_all(warnings)
    run_ids: list[str | None] = [None] * len(points)
    if not dry_run:
        app.make_home(settings)
        wishes = [Wish(p.spec, p.found, p.warnings, p.values) for p in points]
        store = app.open_store(settings)
        run_ids = list(submit_all(store, context, wishes, app.user_name(), after=after, sweep=name))
    if as_json:
        rows = [
            {
                **queued_json(run_id, point.spec, point.found, point.warnings),
                "sweep": name,
                "name": point.spec.trainer.experiment_name,
                "values": point.values,
            }
            for run_id, point in zip(run_ids, points, strict=True)
        ]
        click.echo(output.json_line(rows))
    elif dry_run:
        for point, text in zip(points, texts, strict=True):
            click.echo(
                f"{text}: {counted(point.found.planned_steps, 'step')}, spec {spec_digest(point.spec)[:12]}"
            )
        output.note(f"{counted(len(points), 'run')} would be queued; nothing was.")
    else:
        for run_id, text in zip(run_ids, texts, strict=True):
            click.echo(run_id if quiet else f"{run_id}  {text}")
        if not quiet:
            output.note(f"{len(points)} runs are queued as {name}; `sftd show {name}` ranks them.")
    if not dry_run:
        app.note_missing_daemon(settings, "they wait")
