"""The composition root: settings → store with its views, context with its actor."""

from __future__ import annotations

import getpass
import os
import sys
from typing import TYPE_CHECKING

import click

from sftd import settings as settings_module
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.operations.context import Context
    from sftd.store.engine import Store


def read_settings() -> Settings:
    """The settings of this process."""
    return settings_module.read()


def user_name() -> str:
    """Who asks."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def context() -> Context:
    """Context of an operation asked for at the command line."""
    from sftd.operations.context import Context

    return Context(actor=f"cli:{user_name()}")


def make_home(settings: Settings) -> None:
    """Make `SFTD_HOME`, mode 0700."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)


def open_store(settings: Settings) -> Store:
    """Open the database. An embedded SQLite database is made and upgraded on the way; a server's tables are only ever
    changed by `sftd init`. Raises `DatabaseNotReady` or `DatabaseUnreachable`."""
    from sftd.projections import views
    from sftd.store.engine import Store, open_engine
    from sftd.store.tables import SCHEMA_REVISION

    engine = open_engine(settings.database_url)
    store = Store(engine, before_commit=(views.catch_up,))
    try:
        if engine.dialect.name == "sqlite" and store.schema_revision() != SCHEMA_REVISION:
            from sftd.store import migrate

            migrate.upgrade(engine)
        store.check_schema()
        views_up_to_date(store)
    except BaseException:
        # A daemon that waits for its database asks again every second, for days if need be.
        engine.dispose()
        raise
    if (command := click.get_current_context(silent=True)) is not None:
        # Not left to the garbage collector: it would warn of connections that nobody closed.
        command.find_root().call_on_close(engine.dispose)
    return store


def open_existing_store(settings: Settings) -> Store | None:
    """The database for a command that only asks it for more than it needs to know: None where there is none yet. Raises as
    `open_store`."""
    file = settings_module.sqlite_file(settings.database_url)
    return None if file is not None and not file.exists() else open_store(settings)


# Daemons say that they live three times in a lease.
_SILENT_LEASES = 2


def silent_micros(settings: Settings) -> int:
    """For how long a daemon may be silent and still be one that starts runs, in µs."""
    return int(_SILENT_LEASES * settings.lease_seconds * 1_000_000)


def views_up_to_date(store: Store) -> None:
    """Fold what the views lack: nothing, unless they were deleted."""
    from sftd.projections import views
    from sftd.store import event_store, positions

    with store.read() as connection:
        behind = positions.projection_position(connection, views.NAME) < event_store.last_position(connection)
    if behind:
        with store.write() as tx:
            views.catch_up(tx)


def confirm(question: str) -> None:
    """Ask before something is deleted; a no ends the command. Raises `UsageError` where nobody can be asked."""
    if not sys.stdin.isatty():
        raise click.UsageError("Nobody can be asked here: give --yes to delete without asking.")
    if not click.confirm(question, err=True):
        raise SystemExit("Nothing was deleted.")


def lacks_daemon(settings: Settings) -> bool:
    """Whether nobody drives the runs of this home. On a database server daemons of other homes may, so: False."""
    from sftd.daemon import lock

    return settings.database_url.startswith("sqlite") and lock.holder(settings.daemon_lock) is None
