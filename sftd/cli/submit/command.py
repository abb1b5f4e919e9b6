"""`sftd submit`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output, sources
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.errors import Problem
    from sftd.domain.spec.spec import Spec
    from sftd.settings import Settings
    from sftd.wire.preflight import Preflight


@click.command("submit")
@click.argument("config", required=False, type=click.Path(allow_dash=True))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-f", "--file", "file", type=click.Path(allow_dash=True), help="CONFIG as an option.")
@click.option(
    "-q", "--quiet", is_flag=True, help="Print the run's id alone on stdout; warnings go to stderr."
)
@click.option("--strict", is_flag=True, help="Refuse the run instead of warning.")
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
    help="Show which tokens are trained, and what the run costs; the default on a terminal.",
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
    """Queue the run that CONFIG (YAML; - is standard input) describes, with KEY=VALUE applied to it.

    Keys, types, layout, model and data files are checked now, before a device is held. A refused run leaves no trace. A
    probable mistake is a warning; --strict refuses it.

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
    from sftd.cli.plan.known_hosts import known_hosts
    from sftd.cli.submit.answers import announce, print_dry_run
    from sftd.domain.errors import Refused
    from sftd.domain.submit.facts import SubmitFacts
    from sftd.operations.commands.submit import Wish, check_after, submit_all
    from sftd.wire import preflight
    from sftd.wire.spec import file as spec_file

    if file is not None and config is not None:
        overrides = (config, *overrides)
        config = file
    config = config or file
    if config is None:
        raise click.UsageError("Give a CONFIG file.")
    settings = app.read_settings()
    if grid:
        from sftd.cli.submit import grid as grids

        if print_script or wait:
            option = "--print-script" if print_script else "--wait"
            raise click.UsageError(f"{option} is for one run: it cannot be used with --grid.")
        grids.submit(
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
    spec, warnings = spec_file.read(config, overrides, os.getcwd())
    found = preflight.inspect(spec, known=SubmitFacts(hosts=known_hosts(settings)), home=settings.home)
    warnings = [*warnings, *found.warnings]
    if strict and warnings:
        raise Refused(warnings)
    if after and (dry_run or print_script):
        check_after(app.open_store(settings), after)
    if dry_run:
        print_dry_run(spec, found, warnings, as_json=as_json)
        if xray and not quiet:
            _preview(spec, found, stderr=True)
        return
    if print_script:
        _print_script(settings, spec, found, warnings)
        return
    app.make_home(settings)
    store = app.open_store(settings)
    if not (quiet or as_json) and (output.is_terminal() if xray is None else xray):
        _preview(spec, found)
    (run_id,) = submit_all(store, app.context(), [Wish(spec, found, warnings)], app.user_name(), after=after)
    text = f"is queued: {counted(found.planned_steps, 'step')} over {counted(found.train.usable, 'row')}"
    announce(settings, store, run_id, spec, found, warnings, text, quiet=quiet, as_json=as_json, wait=wait)


def _preview(spec: Spec, found: Preflight, *, stderr: bool = False) -> None:
    """Show which tokens are trained, and in one line what the run costs on this host."""
    from sftd.cli.plan.target import Target, known_pace, plan_facts
    from sftd.cli.plan.view import summary
    from sftd.cli.submit import xray
    from sftd.domain.errors import Refused
    from sftd.domain.plan.plan import make_plan

    out = output.console(stderr=stderr)
    try:
        target = Target.find(spec)
    except Refused:
        xray.show(spec, found, out, "cuda")
        return
    xray.show(spec, found, out, target.machine.device)
    for line in sources.planned(spec, found.train.sources, found.planned_steps):
        out.print(f"  {output.escape(line)}", soft_wrap=True)
    plan = make_plan(spec, plan_facts(found), target.machine, known_pace(found.shape, target.machine))
    out.print(f"  {summary(plan)}", soft_wrap=True)
    if not target.fits(plan.needed, spec.world_size):
        output.warn(f"that is more than the available {output.memory(target.memory)}: see `sftd plan`")


def _print_script(settings: Settings, spec: Spec, found: Preflight, warnings: list[Problem]) -> None:
    """Print the script of the first attempt's job; RUN and TOKEN are placeholders until the run is queued."""
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
    order = order_of(run, None, attempt=1, token="TOKEN")  # noqa: S106  a placeholder
    output.warn_all(warnings)
    click.echo(script(order, RunDir(settings.home, run.run_id).attempt(1)), nl=False)
