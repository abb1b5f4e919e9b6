"""Bringing the tables to the revision that this sftd needs. Alembic is imported only when asked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

import sftd
from sftd.domain.errors import DatabaseNotReady
from sftd.store.database.engine import Store, shown_url

if TYPE_CHECKING:
    from alembic.config import Config


def _folder() -> Path:
    """The migrations: inside the package when it was installed from a wheel, beside it in a checkout."""
    package = Path(sftd.__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def _config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    return config


def upgrade(engine: sa.Engine) -> list[str]:
    """Apply the missing revisions, all in one transaction. Returns them, oldest first; none when there is nothing to do.

    Several processes may do so at once: the first one works, the others wait and then find nothing to do.
    Raises `DatabaseNotReady` when a newer sftd has changed the tables already.
    """
    from alembic import command
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.script.revision import ResolutionError

    # A write transaction is exclusive from its first statement on both databases.
    with Store(engine).write() as tx:
        config = _config(tx.connection)
        scripts = ScriptDirectory.from_config(config)
        found = MigrationContext.configure(tx.connection).get_current_revision()
        try:
            missing = [script.revision for script in scripts.iterate_revisions("head", found or "base")]
        except ResolutionError:
            raise DatabaseNotReady(
                f"{shown_url(str(engine.url))} has tables of revision {found}, which this sftd does not know: a newer "
                "sftd has changed them. Use that one."
            ) from None
        if missing:
            command.upgrade(config, "head")
    return missing[::-1]


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Go back to `revision` ("base" is an empty database). What newer tables hold is lost."""
    from alembic import command

    with Store(engine).write() as tx:
        command.downgrade(_config(tx.connection), revision)
