"""`sftd submit`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.errors import Problem
    from sftd.domain.spec.spec import Spec
    from sftd.settings import Settings
    from sftd.store.database.engine import Store
    from sftd.wire.preflight import Preflight


@click.command("submit")
@click.argument("config", required=False, type=click.Path(allow_dash=True))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-f", "--file", "file", type=click.Path(allow_dash=True), help="The config, as an option.")
@click.option(
    "-q", "--quiet", is_flag=True, help="Print the run's id alone on stdout; warnings go to stderr."
)
@click.option("--strict", is_flag=True, help="Refuse the run where there would be a warning.")
@click.option("--wait", is_flag=True, help="Wait for the run to end; exit with 0 only if it succeeded.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and queue nothing; print the resolved spec, as JSON where stdout is not a terminal.",
)
@click.option(
    "--print-script",
    "print_script",
    is_flag=True,
    help="Check everything, print the job script that the resource manager would get, queue nothing.",
)
@click.option(
    "--after", multiple=True, metavar="RUN", help="Start once this run has succeeded; repeatable. See below."
)
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=VALUE,…",
    help="A run for each value; repeatable: each combination.",
)
@click.option("--json", "as_json", is_flag=True, help="Print id, digest, steps and warnings as JSON.")
@click.option(
    "--xray/--no-xray",
    default=None,
    help="Show which tokens are trained, and what it will take; on a terminal it does.",
)
def submit_command(
    config: str | None,
    overrides: tuple[str, ...],
    file: str | None,
    quiet: bool,
    strict: bool,
    wait: bool,
    dry_run: bool,
    print_script: bool,
    after: tuple[str, ...],
    grid: tuple[str, ...],
    as_json: bool,
    xray: bool | None,
) -> None:
    """Queue the run that CONFIG (YAML; - is standard input) describes, with KEY=VALUE laid over it.

    Everything that can be found wrong is found now, before a device is held: keys, types, layout, model and data
    files. A refused run leaves no trace. What is possible and hardly meant is a warning; with --strict it is refused.

    With --after the run is cancelled when the other one fails or is cancelled. With --grid either all runs are queued or,
    if one of them is refused, none.

    \b
    Example:
      sftd submit run.yaml optimizer.lr=1e-5 trainer.max_steps=200
      sftd submit run.yaml --dry-run --xray
      sftd submit run.yaml 'data.train_files=data/train-*.parquet' --strict
      sftd submit run.yaml --grid optimizer.lr=1e-5,2e-5 --grid model.megatron.seed=1,2
      sftd submit second.yaml --after brave-otter
      sftd submit run.yaml launch.launcher=slurm --print-script
      id=$(sftd submit run.yaml -q) && sftd logs -f "$id"
    """
    from sftd.cli.plan.hosts import known_hosts
    from sftd.domain.errors import Refused
    from sftd.domain.submit.facts import RunFacts
    from sftd.operations.commands.submit import Wish, check_after, submit_all
    from sftd.wire import preflight
    from sftd.wire.spec import file as specfile

    if file is not None and config is not None:
        overrides = (config, *overrides)
        config = file
    config = config or file
    if config is None:
        raise click.UsageError("Give a CONFIG file.")
    settings = app.read_settings()
    if grid:
        from sftd.cli.submit import grid as sweep

        if print_script:
            raise click.UsageError(
                "--print-script shows the script of one run: it cannot be used with --grid."
            )
        if wait:
            raise click.UsageError("--wait waits for one run: it cannot be used with --grid.")
        sweep.submit(
            settings,
            config,
            overrides,
            grid,
            after,
            quiet=quiet,
            strict=strict,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    spec, warnings = specfile.read(config, overrides, os.getcwd())
    found = preflight.inspect(spec, known=RunFacts(hosts=known_hosts(settings)), home=settings.home)
    warnings = [*warnings, *found.warnings]
    if strict and warnings:
        raise Refused(warnings)
    if after and (dry_run or print_script):
        check_after(app.open_store(settings), after)
    if dry_run:
        print_dry_run(spec, found, warnings, as_json=as_json)
        if xray and not quiet:
            look_inside(spec, found, stderr=True)
        return
    if print_script:
        _print_script(settings, spec, found, warnings)
        return
    app.make_home(settings)
    store = app.open_store(settings)
    if not (quiet or as_json) and (output.is_terminal() if xray is None else xray):
        look_inside(spec, found)
    (run_id,) = submit_all(store, app.context(), [Wish(spec, found, warnings)], app.user_name(), after=after)
    said = f"is queued: {counted(found.planned_steps, 'step')} over {counted(found.train.usable, 'row')}"
    announce(settings, store, run_id, spec, found, warnings, said, quiet=quiet, as_json=as_json, wait=wait)


def announce(
    settings: Settings,
    store: Store,
    run_id: str,
    spec: Spec,
    found: Preflight,
    warnings: list[Problem],
    said: str,
    *,
    quiet: bool,
    as_json: bool,
    wait: bool,
) -> None:
    """Tell that a run was queued, in the form that was asked for, and wait for its end if that was."""
    output.when_interrupted(f"{run_id} continues: `sftd logs -f {run_id}`, `sftd cancel {run_id}`.")
    if not as_json:
        output.warn_all(warnings)
    if quiet:
        click.echo(run_id)
    elif as_json:
        from sftd.domain.spec.spec import spec_digest

        click.echo(
            output.json_line(
                {
                    "run_id": run_id,
                    "spec_digest": spec_digest(spec),
                    "planned_steps": found.planned_steps,
                    "warnings": [str(w) for w in warnings],
                }
            )
        )
    else:
        out = output.console()
        out.print(f"[bold]{run_id}[/] {said}", soft_wrap=True)
        out.print(f"Follow it with [bold]sftd events -f {run_id}[/]")
    if app.lacks_daemon(settings):
        output.note("No daemon runs here, so it waits: `sftd daemon --detach` starts one.")
    if wait:
        sys.exit(_wait(store, run_id, quiet or as_json))


def look_inside(spec: Spec, found: Preflight, *, stderr: bool = False) -> None:
    """Show which tokens are trained, and in a line what the run will take on this host."""
    from sftd.cli.plan import host as plan_host
    from sftd.cli.plan.view import summary
    from sftd.cli.submit import xray
    from sftd.domain.errors import Refused
    from sftd.domain.plan.plan import make_plan

    out = output.console(stderr=stderr)
    try:
        host = plan_host.Host.find(spec)
    except Refused:
        host = None
    xray.show(spec, found, out, "cuda" if host is None else host.machine.device)
    if host is None:
        return
    made = make_plan(
        spec, plan_host.facts_of(found), host.machine, plan_host.known_pace(found.shape, host.machine)
    )
    out.print(f"  {summary(made)}", soft_wrap=True)
    if not host.fits(made.needed, spec.world_size):
        output.warn(f"that is more than the {output.memory(host.memory)} there are: see `sftd plan`")


def print_dry_run(spec: Spec, found: Preflight, warnings: list[Problem], *, as_json: bool) -> None:
    """What would be queued, and on stderr what it is warned of: for people on a terminal, else the resolved spec as JSON."""
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


def _print_script(settings: Settings, spec: Spec, found: Preflight, warnings: list[Problem]) -> None:
    """The script of the first attempt's job; the run's name and the lease's token are not known before it is queued."""
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.run.state import Run
    from sftd.launcher.choosing import LAUNCHERS
    from sftd.wire.attempt.directory import RunDir
    from sftd.wire.attempt.orders import order_of

    if (script := LAUNCHERS[spec.launch.launcher].script) is None:
        able = " or ".join(f"launch.launcher={name}" for name, has in LAUNCHERS.items() if has.script)
        raise Refused(
            Problem("launch.launcher", f"is {spec.launch.launcher}, and has no job script", f"add {able}")
        )
    run = Run("RUN", spec=spec, planned_steps=found.planned_steps)
    order = order_of(run, None, attempt=1, token="TOKEN")  # noqa: S106  a word in its place
    output.warn_all(warnings)
    click.echo(script(order, RunDir(settings.home, run.run_id).attempt(1)), nl=False)


def _wait(store: Store, run_id: str, quiet: bool) -> int:
    from sftd.domain.run.state import ENDED
    from sftd.operations.queries import runs as reading

    while True:
        run = reading.find_run(store, run_id)
        if run.status in ENDED:
            if not quiet:
                detail = f": {run.cause}: {run.message}" if run.cause else ""
                output.console().print(f"[bold]{run_id}[/] {run.how_it_ended}{output.escape(detail)}")
            return 0 if run.status == "succeeded" else 1
        time.sleep(0.5)
