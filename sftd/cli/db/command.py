"""`sftd db`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from sftd import settings as settings_module
from sftd.cli import app
from sftd.cli.db.backup import backup_command, restore_command
from sftd.cli.terminal import output
from sftd.cli.terminal.progress import counter
from sftd.domain.text.words import counted

_SHOWN_PROBLEMS = 20


@click.group("db")
def db_command() -> None:
    """Check a database, back it up and restore it, or copy it to another one.

    \b
    Example:
      sftd db check
    """


db_command.add_command(backup_command)
db_command.add_command(restore_command)


@db_command.command("check")
def check_command() -> None:
    """Check the whole log: no version is missing, every event can be read, and the views match the log.

    Prints OK; or prints the problems and exits with 1. Nothing is changed; daemons may continue.

    \b
    Example:
      sftd db check
    """
    from sftd.projections import verify
    from sftd.store.database.engine import Store, open_engine, shown_url

    settings = app.read_settings()
    url = settings.database_url
    _must_exist("SFTD_DATABASE_URL", url)
    engine = open_engine(url)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        # Not `app.open_store`, which brings the views up to date before they are checked.
        store = Store(engine)
        store.check_schema()
        with counter() as show:
            found = verify.check_log(store, lambda done, total: show("reading events", done, total))
    for problem in found.problems[:_SHOWN_PROBLEMS]:
        click.echo(problem)
    if (more := len(found.problems) - _SHOWN_PROBLEMS) > 0:
        click.echo(f"… and {more} more")
    if found.problems:
        output.note(f"{shown_url(url)}: {counted(len(found.problems), 'problem')}")
        sys.exit(1)
    click.echo(f"OK: {counted(found.runs, 'run')}, {counted(found.events, 'event')}")


@db_command.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option(
    "--force", is_flag=True, help="Copy although daemons drive runs; their later events are not copied."
)
@click.option("--json", "as_json", is_flag=True, help="Print rows and digest of each table as JSON.")
def copy_command(source: str, target: str, force: bool, as_json: bool) -> None:
    """Copy a database event for event, with the queue and all cursors, into an empty one, and verify that both are equal.

    FROM and TO are database URLs or SQLite files. The copy is complete or nothing is written. Tables are made in TO if it has
    none. Keep passwords in ~/.pgpass: other users can read a command line.

    \b
    Example:
      sftd daemon --stop
      sftd db copy ~/.sftd/sftd.db postgresql://me@dbhost/sftd
    """
    from sftd.operations.commands import copy_database
    from sftd.store.database.engine import Store, open_engine, shown_url

    source_url, target_url = _url(source), _url(target)
    _must_exist("FROM", source_url)
    with ExitStack() as stack:
        from_store, to_store = Store(open_engine(source_url)), Store(open_engine(target_url))
        for store in (from_store, to_store):
            stack.callback(store.engine.dispose)
        with counter() as show:
            digests = copy_database.copy(from_store, to_store, app.context(), show, force=force)
    if as_json:
        click.echo(output.json_line(digests))
        return
    for name, digest in digests.items():
        click.echo(f"{name:22}{digest.rows:>12,} rows  sha256 {digest.sha256[:16]}…  equal in both")
    click.echo(f"copied to {shown_url(target_url)}; set SFTD_DATABASE_URL to use it")


def _url(given: str) -> str:
    text = given if "://" in given else settings_module.sqlite_url(Path(given).expanduser())
    return settings_module.full_database_url(text)


def _must_exist(where: str, url: str) -> None:
    """Raise `Refused` if a SQLite file is missing: opening it would create it."""
    from sftd.domain.errors import Problem, Refused

    file = settings_module.sqlite_file(url)
    if file is not None and not file.is_file():
        raise Refused(Problem(where, f"there is no file {file}", "name an existing database"))
