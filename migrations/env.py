"""Connect Alembic to the database: the connection from `sftd.store.database.migrate`, else `SFTD_DATABASE_URL`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context

from sftd import settings
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.schema import metadata


def _compared(connection: sa.Connection) -> Any:
    """The filter of autogenerate. SQLite does not report expressions of an index, so that index is not compared there."""
    if connection.dialect.name != "sqlite":
        return None
    return lambda _object, name, kind, _reflected, _other: (kind, name) != ("index", "ix_queue_order")


def _migrate(connection: sa.Connection) -> None:
    # SQLite can change a column only by copying the table, which Alembic does in batch mode.
    batch = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=batch,
        include_object=_compared(connection),
    )
    # Uses the caller's transaction, so that all revisions are applied or none.
    context.run_migrations()


def _print_sql(url: str) -> None:
    context.configure(url=url, target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def _main() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        _migrate(given)
        return
    url = settings.read().database_url
    if context.is_offline_mode():
        _print_sql(url)
        return
    engine = open_engine(url)
    with Store(engine).write() as tx:
        _migrate(tx.connection)
    engine.dispose()


_main()
