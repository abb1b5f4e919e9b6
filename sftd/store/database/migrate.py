"""Migrate the tables to the revision that this sftd needs. Functions import Alembic, because the import is slow."""

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
    """The folder of migrations: inside the package in a wheel, beside the package in a checkout."""
    package = Path(sftd.__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def _config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    return config


def upgrade(engine: sa.Engine) -> list[str]:
    """Apply the missing revisions in one transaction. Returns them, oldest first.

    Several processes may call this at once: the first one migrates; the others wait and find nothing to do.
    Raises `DatabaseNotReady` when a newer sftd has already changed the tables.
    """
    from alembic import command
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.script.revision import ResolutionError

    # On both databases a write transaction is exclusive from its first statement.
    with Store(engine).write() as tx:
        config = _config(tx.connection)
        scripts = ScriptDirectory.from_config(config)
        found = MigrationContext.configure(tx.connection).get_current_revision()
        try:
            missing = [script.revision for script in scripts.iterate_revisions("head", found or "base")]
        except ResolutionError:
            raise DatabaseNotReady(
                f"{shown_url(str(engine.url))} has tables of revision {found}, which this sftd does not support: a newer "
                "sftd has changed them. Use that version."
            ) from None
        if missing:
            command.upgrade(config, "head")
    return missing[::-1]


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Revert the tables to `revision` ("base" is an empty database). The contents of newer tables are lost."""
    from alembic import command

    with Store(engine).write() as tx:
        command.downgrade(_config(tx.connection), revision)
