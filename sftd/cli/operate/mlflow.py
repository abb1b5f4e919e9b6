"""`sftd mlflow`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.model_registry import Registry, require_mlflow
from sftd.cli.terminal import output
from sftd.domain.errors import Problem, Refused, SftdError
from sftd.domain.text.words import counted
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.projections.mirrors.mlflow.check import MirrorComparison
    from sftd.store.database.engine import Store


@click.group("mlflow")
def mlflow_command() -> None:
    """Compare MLflow with the log, rebuild its runs from the log, and register models.

    \b
    Example:
      sftd mlflow check
      sftd mlflow rebuild
    """


@mlflow_command.command("check")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--prefix", default="", help="Check the experiments with this prefix.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
def check_command(runs: tuple[str, ...], prefix: str, as_json: bool) -> None:
    """Compare MLflow with the log: every point of every metric, status, times, parameters, data sets and tags.

    Without RUN, all runs. Exits with 1 if anything differs or is missing.

    \b
    Example:
      sftd mlflow check
      sftd mlflow check brave-otter --json
    """
    from sftd.projections.mirrors.mlflow import check as mlflow_check
    from sftd.projections.mirrors.mlflow.client import Tracking

    settings, store = _opened()
    tracking = Tracking(settings.mlflow_tracking_uri, settings.mlflow_artifacts)
    wanted = mlflow_check.versions(store, app.resolve_runs(store, runs))
    checked = (mlflow_check.compare_run(store, tracking, prefix, *run) for run in wanted.items())
    _print_checked(checked, len(wanted), as_json)


@mlflow_command.command("rebuild")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--prefix",
    default="rebuilt/",
    show_default=True,
    help="Prefix of each experiment's name; \"\" fills the mirror's own experiments.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
def rebuild_command(runs: tuple[str, ...], prefix: str, as_json: bool) -> None:
    """Rebuild MLflow's runs from the log, in experiments of their own, and compare each with the log.

    Without RUN, all runs. Existing points are not written again, so the command may be interrupted and repeated. Exits with 1
    if anything differs at the end.

    \b
    Example:
      sftd mlflow rebuild
      sftd mlflow rebuild brave-otter --prefix 'again/'
    """
    from sftd.operations.queries import resolve
    from sftd.projections.mirrors.mlflow import check as mlflow_check

    settings, store = _opened()
    found = [run_id for run in runs for run_id in resolve.several_to_change(store, run)]
    total = len(mlflow_check.versions(store, found))
    uri, artifacts = settings.mlflow_tracking_uri, settings.mlflow_artifacts
    _print_checked(mlflow_check.rebuild(store, uri, artifacts, prefix, found), total, as_json)


@mlflow_command.command("register")
@click.argument("run")
@click.argument("name")
@click.option(
    "--step", type=click.IntRange(min=1), help="The export of this step; the last export if not given."
)
def register_command(run: str, name: str, step: int | None) -> None:
    """Register an export of RUN as a version of the model NAME in MLflow's registry.

    The exported folder is compared with its digest in the log, and copied to the artifacts of the MLflow run.

    \b
    Example:
      sftd export brave-otter ./my-model
      sftd mlflow register brave-otter support
    """
    from sftd.operations.driving import checkpoints
    from sftd.operations.queries import resolve

    settings, store = _opened()
    run_id = resolve.one_to_change(store, run)
    exports = [x for x in checkpoints.exports(store, run_id) if step in (None, x.step)]
    if not exports:
        what = f"{run_id} has no export" + (f" of step {step}" if step is not None else "")
        raise Refused(Problem("RUN", what, f"sftd export {run_id} DIR --register {name}"))
    version = Registry(settings, store, run_id, name).register(exports[-1])
    click.echo(f"registered {exports[-1].path} as {name} version {version}")


def _opened() -> tuple[Settings, Store]:
    settings = app.read_settings()
    require_mlflow(settings)
    return settings, app.open_store(settings)


def _print_checked(checked: Iterable[MirrorComparison], total: int, as_json: bool) -> None:
    """Print the result of each run, and exit with 1 if any differs."""
    import msgspec

    points = equal = 0
    for found in checked:
        points += found.points
        equal += found.is_equal
        if as_json:
            click.echo(output.json_line(msgspec.to_builtins(found) | {"is_equal": found.is_equal}))
            continue
        if found.is_equal:
            click.echo(
                f"{found.run_id}: {counted(found.points, 'point')}, equal to the log, in {found.experiment}"
            )
            continue
        click.echo(f"{found.run_id}: in {found.experiment}, not equal to the log", err=True)
        if found.behind:
            click.echo(f"  {counted(found.behind, 'event')} not mirrored yet: a daemon does it", err=True)
        for difference in found.differences:
            click.echo(f"  {difference}", err=True)
    if not as_json and total:
        click.echo(f"equal to the log: {equal} of {counted(total, 'run')}, {counted(points, 'point')}")
    elif not as_json:
        click.echo("The log has no runs.")
    if equal < total:
        sys.exit(SftdError.exit_code)
