"""`sftd init`, `sftd views`."""

from __future__ import annotations

import click

from sftd.cli import app
from sftd.domain.text.words import counted


@click.command("init")
def init_command() -> None:
    """Create or upgrade the database at SFTD_DATABASE_URL, and SFTD_HOME.

    Safe to run again. Any other command that needs an embedded SQLite database creates it, too.

    \b
    Example:
      SFTD_DATABASE_URL=postgresql://me@dbhost/sftd sftd init
    """
    from sftd.store.database import migrate
    from sftd.store.database.engine import open_engine, shown_url

    settings = app.read_settings()
    app.make_home(settings)
    engine = open_engine(settings.database_url)
    applied = migrate.upgrade(engine)
    engine.dispose()
    url = shown_url(settings.database_url)
    click.echo(f"{url}: {'applied ' + ', '.join(applied) if applied else 'is up to date'}")
    click.echo(f"home: {settings.home}")


@click.group("views")
def views_command() -> None:
    """Rebuild the views folded from the log, which `ls` and `show` read.

    \b
    Example:
      sftd views rebuild
    """


@views_command.command("rebuild")
def rebuild_command() -> None:
    """Delete the views and fold them again from the first event.

    \b
    Example:
      sftd views rebuild
    """
    from sftd.projections import views

    count = views.rebuild(app.open_store(app.read_settings()))
    click.echo(f"rebuilt from {counted(count, 'event')}")
