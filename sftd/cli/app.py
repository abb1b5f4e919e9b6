"""The composition root: settings → store with its views, context with its actor."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import click

from sftd import settings as settings_module
from sftd.domain.errors import HomeUnusable
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.operations.context import Context
    from sftd.store.database.engine import Store


def read_settings() -> Settings:
    """The settings of this process."""
    return settings_module.read()


def user_name() -> str:
    """Name of the user who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def context() -> Context:
    """The context of an operation from the command line."""
    from sftd.operations.context import Context

    return Context(actor=f"cli:{user_name()}")


def make_home(settings: Settings) -> None:
    """Make `SFTD_HOME`, mode 0700. Raises `HomeUnusable`."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        what = f"SFTD_HOME={settings.home} cannot be made: {error.strerror}"
        raise HomeUnusable(f"{what}\n    fix: set SFTD_HOME to a folder in which you may write") from None


def require_home(settings: Settings) -> None:
    """Check that `SFTD_HOME` exists: a command that only reads does not make it. Raises `HomeUnusable`."""
    if not settings.home.exists():
        what = f"There is nothing at {settings.home}"
        if "SFTD_HOME" in os.environ:
            raise HomeUnusable(
                f"{what}: this folder does not exist\n    fix: correct SFTD_HOME, or make it: `sftd init`"
            )
        raise HomeUnusable(
            f"{what} yet\n    fix: `sftd submit CONFIG` queues a first run; `sftd demo` shows all of it"
        )


def open_store(settings: Settings) -> Store:
    """Open the database. Creates or upgrades an embedded SQLite database; only `sftd init` changes a server's tables.
    Does not create a missing home: commands that write call `make_home`.

    Raises `DatabaseNotReady`, `DatabaseUnreachable` or `HomeUnusable`.
    """
    from sftd.projections import views
    from sftd.store.database.engine import Store, open_engine
    from sftd.store.database.tables import SCHEMA_REVISION

    file = settings_module.sqlite_file(settings.database_url)
    if file is not None and file.parent == settings.home:
        require_home(settings)
    engine = open_engine(settings.database_url)
    store = Store(engine, before_commit=(views.catch_up,))
    try:
        if engine.dialect.name == "sqlite" and store.schema_revision() != SCHEMA_REVISION:
            from sftd.store.database import migrate

            migrate.upgrade(engine)
        store.check_schema()
        catch_up_views(store)
    except BaseException:
        # A daemon that waits for its database calls this every second, for days if necessary.
        engine.dispose()
        raise
    if (command := click.get_current_context(silent=True)) is not None:
        # The garbage collector would warn of unclosed connections.
        command.find_root().call_on_close(engine.dispose)
    return store


def open_existing_store(settings: Settings) -> Store | None:
    """The database for a command that also works without one: None if there is none yet. Raises as `open_store`."""
    file = settings_module.sqlite_file(settings.database_url)
    return None if file is not None and not file.exists() else open_store(settings)


def catch_up_views(store: Store) -> None:
    """Fold events that the views lack. There are none unless the views were deleted."""
    from sftd.projections import views
    from sftd.store.log import event_store, positions

    with store.read() as connection:
        position = positions.projection_position(connection, views.NAME)
        lacks_events = position < event_store.last_position(connection)
    if lacks_events:
        with store.write() as tx:
            views.catch_up(tx)


def confirm(question: str) -> None:
    """Ask before a deletion; the answer no ends the command. Raises `UsageError` if stdin is not a terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError("Cannot ask: stdin is not a terminal. Give --yes to delete without asking.")
    if not click.confirm(question, err=True):
        raise SystemExit("Nothing was deleted.")


def resolve_run(store: Store, text: str) -> str:
    """The id of the run that a reading command shows. A remark on stderr reports a choice among several runs."""
    from sftd.cli.terminal import output
    from sftd.operations.queries import resolve

    run_id, remark = resolve.one(store, text)
    if remark:
        output.note(remark)
    return run_id


def resolve_runs(store: Store, texts: Iterable[str]) -> list[str]:
    """The ids of the runs that a reading command shows; a sweep means its runs."""
    from sftd.cli.terminal import output
    from sftd.operations.queries import resolve

    run_ids, remarks = resolve.several(store, texts)
    for remark in remarks:
        output.note(remark)
    return run_ids


def change_each(store: Store, text: str, usable: Collection[str], change: Callable[[str], None]) -> None:
    """Change the run that `text` means, or each run of a sweep whose status is in `usable`. Warns of a sweep's run that
    can no longer change, and continues."""
    from sftd.cli.terminal import output
    from sftd.domain.errors import Refused
    from sftd.operations.queries import resolve

    run_ids = resolve.several_to_change(store, text, usable)
    for run_id in run_ids:
        try:
            change(run_id)
        except Refused as refused:
            if len(run_ids) == 1:
                raise
            output.warn(str(refused))


def note_missing_daemon(settings: Settings, consequence: str) -> None:
    """Print a note if no daemon drives the runs of this home. On a database server, daemons of other homes may."""
    from sftd.cli.terminal import output
    from sftd.daemon import lock

    if settings.database_url.startswith("sqlite") and lock.holder(settings.daemon_lock) is None:
        output.note(f"No daemon runs here, so {consequence}: `sftd daemon --detach` starts one.")
