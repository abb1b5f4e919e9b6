"""`sftd db backup`, `sftd db restore`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.progress import counter
from sftd.domain.text.words import counted
from sftd.settings import Settings, sqlite_file

if TYPE_CHECKING:
    from sftd.operations.commands.restore import RestoreOutlook

_SHOWN = 10


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
def backup_command(file: Path) -> None:
    """Write a backup of the database to the new file FILE. Daemons and commands may use the database meanwhile.

    MLflow's database, where it is a SQLite file in SFTD_HOME, is written to FILE.mlflow. Each is a consistent snapshot,
    checked, synced to disk, and private (mode 0600). Checkpoints are not included.
    A PostgreSQL database is backed up with pg_dump: the command prints how.

    \b
    Example:
      sftd db backup backups/2026-01-31.db
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.store.database import backups

    settings = app.read_settings()
    database = sqlite_file(settings.database_url)
    if database is None:
        command = ["pg_dump", "--format=custom", f"--file={file}", backups.client_url(settings.database_url)]
        raise _not_sqlite("a PostgreSQL database is backed up with PostgreSQL's own tools", command)
    _must_exist("SFTD_DATABASE_URL", database)
    pairs = [(database, file)]
    if (mlflow := _mlflow_file(settings)) is not None and mlflow.exists():
        pairs.append((mlflow, _mlflow_backup(file)))
    for _, target in pairs:
        if target.exists():
            raise Refused(Problem("FILE", f"{target} exists already", "name a new file, or delete that one"))
    if not file.absolute().parent.is_dir():
        raise Refused(
            Problem("FILE", f"there is no folder {file.absolute().parent}", "make it, or name another")
        )
    for source, target in pairs:
        size = backups.write(source, target)
        click.echo(f"{target}: {output.size(size)}, checked; the backup of {source}")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Restore FILE even if `sftd db check` finds problems in it.")
def restore_command(file: Path, force: bool) -> None:
    """Replace the database by the backup FILE, and MLflow's database by FILE.mlflow where both exist.

    Stop the daemon first, and let attempts end: the command refuses while a daemon or an attempt of this home runs, or
    another process has the database open. It checks FILE before it changes anything (SQLite's own check, then that of `sftd db check`), and
    upgrades the tables of an older sftd in the restored copy; FILE itself does not change. The replaced database is kept
    beside the new one. Afterwards it lists runs, attempts and checkpoints of this host that the restored log lacks.

    \b
    Example:
      sftd daemon --stop
      sftd db restore backups/2026-01-31.db
      sftd daemon --detach
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.store.database import backups

    settings = app.read_settings()
    database = sqlite_file(settings.database_url)
    if database is None:
        target = backups.client_url(settings.database_url)
        command = [
            "pg_restore",
            "--clean",
            "--if-exists",
            "--single-transaction",
            f"--dbname={target}",
            str(file),
        ]
        raise _not_sqlite("a PostgreSQL database is restored with PostgreSQL's own tools", command)
    _must_exist("FILE", file)
    if database.exists() and file.samefile(database):
        raise Refused(Problem("FILE", f"{file} is the database itself", "name a backup"))
    app.make_home(settings)
    database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mlflow, mlflow_backup = _mlflow_file(settings), _mlflow_backup(file)
    with ExitStack() as stack:
        stack.enter_context(_alone(settings, [database, *([mlflow] if mlflow else [])]))
        new = stack.enter_context(backups.staged(file, database))
        seen = _examine(new, file, settings, force=force)
        new_mlflow = None
        if mlflow is not None and mlflow_backup.exists():
            new_mlflow = stack.enter_context(backups.staged(mlflow_backup, mlflow))
        _print_put(file, database, backups.put(new, database))
        if mlflow is not None and new_mlflow is not None:
            _print_put(mlflow_backup, mlflow, backups.put(new_mlflow, mlflow))
    _print(seen, settings)
    if mlflow is not None and new_mlflow is None and mlflow.exists():
        output.note(
            f"{mlflow} stays as it is: there is no {mlflow_backup}. `sftd mlflow check` compares it with the log"
        )


def _print_put(backup: Path, database: Path, kept: Path | None) -> None:
    click.echo(
        f"restored {database} from {backup}" + (f"\nthe replaced database is kept as {kept}" if kept else "")
    )


def _not_sqlite(what: str, command: list[str]) -> Exception:
    from sftd.domain.errors import Problem, Refused

    return Refused(Problem("SFTD_DATABASE_URL", what, f"run `{shlex.join(command)}`"))


def _must_exist(where: str, file: Path) -> None:
    from sftd.domain.errors import Problem, Refused

    if not file.is_file():
        raise Refused(Problem(where, f"there is no file {file}", "name an existing one"))


def _mlflow_file(settings: Settings) -> Path | None:
    """MLflow's database file if it is in this home; other homes may share one elsewhere."""
    file = sqlite_file(settings.mlflow_tracking_uri)
    return file if file is not None and file.is_relative_to(settings.home) else None


def _mlflow_backup(file: Path) -> Path:
    return file.with_name(f"{file.name}.mlflow")


@contextmanager
def _alone(settings: Settings, files: list[Path]) -> Iterator[None]:
    """Keep daemons of this home from starting until the block ends. Raises `Refused` if a process uses these files or trains
    in this home."""
    from sftd.daemon.lock import AlreadyRunning, DaemonLock
    from sftd.domain.errors import Problem, Refused
    from sftd.launcher import processes

    with ExitStack() as stack:
        try:
            stack.enter_context(DaemonLock(settings.daemon_lock))
        except AlreadyRunning as error:
            raise Refused(Problem("daemon", str(error), "stop it: `sftd daemon --stop`")) from None
        if training := processes.of_attempts(settings.home / "runs"):
            runs = ", ".join(sorted({place.parts[0] for place in training.values()}))
            fix = "let them end, or `sftd cancel` them while a daemon runs, or kill them (they continue from their last "
            fix += f"checkpoint): kill -9 {' '.join(map(str, training))}"
            raise Refused(Problem("runs", f"processes of {runs} still train", fix))
        for file in files:
            if users := processes.using(file):
                who = "; ".join(
                    f"pid {pid}: {command[:120]}" for pid, command in list(users.items())[:_SHOWN]
                )
                raise Refused(Problem(str(file), f"is in use ({who})", "end these processes first"))
        yield


def _examine(new: Path, file: Path, settings: Settings, *, force: bool) -> RestoreOutlook:
    """Upgrade and check the restored copy. Returns this host's runs and checkpoints that it lacks. Raises `Refused`."""
    from sftd.domain.errors import Problem, Refused
    from sftd.operations.commands import restore
    from sftd.projections import verify, views
    from sftd.store.database import migrate
    from sftd.store.database.engine import Store, open_file

    store = Store(open_file(new), before_commit=(views.catch_up,))
    with ExitStack() as stack:
        stack.callback(store.engine.dispose)
        if not store.has_log():
            raise Refused(
                Problem(
                    "FILE", f"{file} is not a database of sftd", "name a file that `sftd db backup` wrote"
                )
            )
        migrate.upgrade(store.engine)
        app.catch_up_views(store)
        with counter() as show:
            found = verify.check_log(store, lambda done, total: show("reading events", done, total))
        problems = counted(len(found.problems), "problem")
        if found.problems and not force:
            shown = [Problem("FILE", problem) for problem in found.problems[:_SHOWN]]
            fix = "restore another backup, or this one with --force"
            raise Refused([*shown, Problem("FILE", f"{file} has {problems}", fix)])
        click.echo(f"{file}: {counted(found.runs, 'run')}, {counted(found.events, 'event')}, {problems}")
        return restore.outlook(store, settings.home)


def _print(seen: RestoreOutlook, settings: Settings) -> None:
    """Print runs, attempts and checkpoints that the restored log lacks, and how the next daemon treats them."""
    from sftd.launcher import processes

    lines = [
        f"{run_id}: its checkpoint of step {step} is newer than the restored log and is not used: {path}"
        for run_id, step, path in seen.newer
    ]
    lines += [f"{run_id}: has a folder here, but the restored log lacks the run" for run_id in seen.unknown]
    lines += [
        f"{run_id}: the restored log lacks attempt {attempt}; the next daemon sets its folder aside when it starts one"
        for run_id, attempt in seen.later
    ]
    here = processes.host_name()
    lines += [
        f"{run_id}: the next daemon reads the rest of attempt {attempt}'s journal, and starts another attempt if it has "
        "not succeeded"
        if host == here
        else f"{run_id}: attempt {attempt} is left to a daemon on {host or 'an unknown host'}"
        for run_id, attempt, host in seen.driven
    ]
    for line in lines:
        click.echo(output.printable(line))
    click.echo(
        f"start a daemon to continue: `sftd daemon --detach`{'' if lines else '. Nothing here is newer than the log'}"
    )
