"""`sftd mlflow`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sftd.cli import app, output
from sftd.domain.errors import Problem, Refused, SftdError
from sftd.domain.words import counted
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.domain.events import ModelExported
    from sftd.projections.mlflow_check import Checked
    from sftd.store.engine import Store


@click.group("mlflow")
def mlflow_command() -> None:
    """MLflow shows what the log holds. It can be compared with the log, and built anew from it.

    \b
    Example:
      sftd mlflow check
      sftd mlflow rebuild
    """


@mlflow_command.command("check")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--prefix", default="", help="Look into the experiments with this prefix.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
def check(runs: tuple[str, ...], prefix: str, as_json: bool) -> None:
    """Compare MLflow with the log: every point of every metric, status, times, parameters, data sets and tags.

    Without RUN, all runs. Returns 1 if anything differs, or is not there yet.

    \b
    Example:
      sftd mlflow check
      sftd mlflow check brave-otter --json
    """
    from sftd.projections import mlflow_check
    from sftd.projections.mlflow_client import Tracking

    settings, store = _opened()
    tracking = Tracking(settings.mlflow_tracking_uri, settings.mlflow_artifacts)
    wanted = mlflow_check.versions(store, app.pick_all(store, runs))
    checked = (mlflow_check.check(store, tracking, prefix, *run) for run in wanted.items())
    _tell(checked, len(wanted), as_json)


@mlflow_command.command("rebuild")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--prefix",
    default="rebuilt/",
    show_default=True,
    help='What goes before the name of each experiment; "" fills the mirror\'s own.',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
def rebuild(runs: tuple[str, ...], prefix: str, as_json: bool) -> None:
    """Build MLflow's runs anew from the log, in experiments of their own, and compare each with the log.

    Without RUN, all runs. What is there already is not written again, so it may be ended at any time and called again.
    Returns 1 if anything differs in the end.

    \b
    Example:
      sftd mlflow rebuild
      sftd mlflow rebuild brave-otter --prefix 'again/'
    """
    from sftd.operations import naming
    from sftd.projections import mlflow_check

    settings, store = _opened()
    found = [run_id for run in runs for run_id in naming.several_to_change(store, run)]
    total = len(mlflow_check.versions(store, found))
    uri, artifacts = settings.mlflow_tracking_uri, settings.mlflow_artifacts
    _tell(mlflow_check.rebuild(store, uri, artifacts, prefix, found), total, as_json)


@mlflow_command.command("register")
@click.argument("run")
@click.argument("name")
@click.option(
    "--step", type=click.IntRange(min=1), help="The export of this step; the last export if not given."
)
def register(run: str, name: str, step: int | None) -> None:
    """Make a model that `sftd export` has written a version of the model NAME in MLflow's registry.

    The exported folder is compared with its digest in the log, and copied to the artifacts of the MLflow run.

    \b
    Example:
      sftd export brave-otter ./my-model
      sftd mlflow register brave-otter support
    """
    from sftd.operations import checkpoints, naming

    settings, store = _opened()
    run_id = naming.one_to_change(store, run)
    exports = [x for x in checkpoints.exports(store, run_id) if step in (None, x.step)]
    if not exports:
        what = f"{run_id} has no export" + (f" of step {step}" if step is not None else "")
        raise Refused(Problem("RUN", what, f"sftd export {run_id} DIR --register {name}"))
    version = Registry(settings, store, run_id, name).register(exports[-1])
    click.echo(f"registered {exports[-1].path} as {name} version {version}")


class Registry:
    """MLflow's model registry, for the exports of one run. Raises `Refused` if nothing can be registered as `name`."""

    def __init__(self, settings: Settings, store: Store, run_id: str, name: str) -> None:
        from sftd.projections import mlflow_check
        from sftd.projections.mlflow_client import Tracking

        if not name.strip() or any(mark in name for mark in "/:\"'\\"):
            raise Refused(
                Problem("NAME", f"{name!r} cannot be a model's name", "use no / : \\ and no quotes")
            )
        _needs_mlflow(settings)
        self._store, self._run_id, self._name = store, run_id, name
        self._tracking = Tracking(settings.mlflow_tracking_uri, settings.mlflow_artifacts)
        place = mlflow_check.place(store, self._tracking, run_id)
        if place is None or place.run is None:
            fix = "start the mirror with `sftd daemon --detach`, or fill it with `sftd mlflow rebuild --prefix ''`"
            raise Refused(Problem("MLflow", f"it has no run of {run_id} yet", fix))
        self._uuid = place.run.uuid

    def register(self, exported: ModelExported) -> str:
        """Copy an export into the registry, and record that. Returns the version there."""
        from sftd.domain.events import ModelRegistered
        from sftd.operations import checkpoints

        folder = Path(exported.path)
        if not folder.is_dir() or _digest(folder) != exported.digest:
            what = "is not what was exported" if folder.is_dir() else "is not there"
            raise Refused(Problem(str(folder), what, f"export it again: sftd export {self._run_id} DIR"))
        tags = {
            "sftd.run": self._run_id,
            "sftd.step": str(exported.step),
            "sftd.export_digest": exported.digest,
        }
        place = f"models/step-{exported.step}"
        version = self._tracking.register(self._uuid, folder, place, self._name, tags)
        registered = ModelRegistered(
            step=exported.step,
            name=self._name,
            model_version=version,
            digest=exported.digest,
            by=app.user_name(),
        )
        checkpoints.record_registration(self._store, app.context(), self._run_id, registered)
        return version


def _digest(folder: Path) -> str:
    """As the export wrote it: the sha256 of what `sha256sum` prints for the files in the order of their names."""
    lines = []
    for name in sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()):
        with open(folder / name, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _needs_mlflow(settings: Settings) -> None:
    if not settings.mlflow_tracking_uri:
        raise Refused(
            Problem("MLFLOW_TRACKING_URI", "it is empty: the mirror is off", "name an MLflow, or unset it")
        )


def _opened() -> tuple[Settings, Store]:
    settings = app.read_settings()
    _needs_mlflow(settings)
    return settings, app.open_store(settings)


def _tell(checked: Iterable[Checked], total: int, as_json: bool) -> None:
    """Print what came of each run, and end with 1 if any differs."""
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
            click.echo(f"  {counted(found.behind, 'event')} not there yet: a daemon mirrors them", err=True)
        for difference in found.differences:
            click.echo(f"  {difference}", err=True)
    if not as_json and total:
        click.echo(f"equal to the log: {equal} of {counted(total, 'run')}, {counted(points, 'point')}")
    elif not as_json:
        click.echo("The log has no runs.")
    if equal < total:
        sys.exit(SftdError.exit_code)
