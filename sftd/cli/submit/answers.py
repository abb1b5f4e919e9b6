"""The output of `sftd submit` and `sftd fork` about a run that they queue, or would queue."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.domain.errors import Problem
    from sftd.domain.spec.spec import Spec
    from sftd.settings import Settings
    from sftd.store.database.engine import Store
    from sftd.wire.preflight import Preflight


def announce(
    settings: Settings,
    store: Store,
    run_id: str,
    spec: Spec,
    found: Preflight,
    warnings: list[Problem],
    text: str,
    *,
    quiet: bool,
    as_json: bool,
    wait: bool,
) -> None:
    """Print that a run is queued, in the requested form. With `wait`, wait for its end and exit."""
    output.when_interrupted(f"{run_id} continues: `sftd logs -f {run_id}`, `sftd cancel {run_id}`.")
    if not as_json:
        output.warn_all(warnings)
    if quiet:
        click.echo(run_id)
    elif as_json:
        click.echo(output.json_line(queued_json(run_id, spec, found, warnings)))
    else:
        out = output.console()
        out.print(f"[bold]{run_id}[/] {text}", soft_wrap=True)
        out.print(f"Follow it with [bold]sftd events -f {run_id}[/]")
    app.note_missing_daemon(settings, "it waits")
    if wait:
        sys.exit(_wait(store, run_id, quiet or as_json))


def queued_json(
    run_id: str | None, spec: Spec, found: Preflight, warnings: list[Problem]
) -> dict[str, object]:
    """A queued run as JSON values; the id is None in a dry run."""
    from sftd.domain.spec.spec import spec_digest

    return {
        "run_id": run_id,
        "spec_digest": spec_digest(spec),
        "planned_steps": found.planned_steps,
        "warnings": [str(w) for w in warnings],
    }


def print_dry_run(spec: Spec, found: Preflight, warnings: list[Problem], *, as_json: bool) -> None:
    """Print what would be queued, and warnings on stderr; where stdout is no terminal, the resolved spec as JSON."""
    from sftd.domain.run.trajectory import changes
    from sftd.domain.spec.spec import Spec, canonical_json, spec_digest

    output.warn_all(warnings)
    if as_json or not output.is_terminal():
        click.echo(output.json_text(canonical_json(spec)))
        return
    click.echo(
        f"Every check passes: {found.planned_steps} steps, spec {spec_digest(spec)[:12]}. Nothing was queued.\n"
    )
    click.echo("Settings that are not the defaults (--json prints all of them):")
    for key, (_, value) in changes(Spec(), spec).items():
        click.echo(f"  {key}: {output.printable(value if isinstance(value, str) else output.compact(value))}")


def _wait(store: Store, run_id: str, quiet: bool) -> int:
    from sftd.domain.run.state import ENDED
    from sftd.operations.queries import runs

    while True:
        run = runs.find_run(store, run_id)
        if run.status in ENDED:
            if not quiet:
                detail = f": {run.cause}: {run.message}" if run.cause else ""
                output.console().print(f"[bold]{run_id}[/] {run.how_it_ended}{output.escape(detail)}")
            return 0 if run.status == "succeeded" else 1
        time.sleep(0.5)
