"""Copy a database to another server."""

from __future__ import annotations

from sftd.domain.errors import Problem, Refused
from sftd.operations.context import Context
from sftd.store.database import copying, migrate
from sftd.store.database.copying import Progress, TableDigest
from sftd.store.database.engine import Store, shown_url
from sftd.store.database.tables import SCHEMA_REVISION
from sftd.store.queue import leases


def copy(
    source: Store, target: Store, context: Context, progress: Progress, *, force: bool = False
) -> dict[str, TableDigest]:
    """Copy one snapshot of `source` into the empty `target`, in one transaction. Creates the tables if `target` has none.
    Returns the digest of each table, which is the same in both databases. Raises `Refused`; with `force` not for runs
    that a daemon still drives."""
    _refuse_other_tables("FROM", source)
    with source.read() as connection:
        now = source.clock(connection, context.now())
        live = [lease.run_id for lease in leases.leases(connection) if lease.expires_at > now]
        if live and not force:
            what = f"daemons drive {', '.join(live[:3])}{' and others' if len(live) > 3 else ''}"
            fix = (
                "stop them with `sftd daemon --stop` (training continues) and wait until their leases have expired, "
                "or copy the current state with --force"
            )
            raise Refused(Problem("FROM", what, fix))
        if target.schema_revision() is None:
            migrate.upgrade(target.engine)
        _refuse_other_tables("TO", target)
        # No other process uses the target yet, and reading a large table of the source may take long.
        with target.write(may_idle=True) as tx:
            if (table := copying.first_filled(tx.connection)) is not None:
                what = f"{_shown(target)} is not empty: its table {table} has rows"
                raise Refused(Problem("TO", what, "name an empty database"))
            return copying.copy(connection, tx, progress)


def _refuse_other_tables(where: str, store: Store) -> None:
    found = store.schema_revision()
    if found != SCHEMA_REVISION:
        what = f"{_shown(store)} has tables of revision {found or 'none'}, this sftd needs {SCHEMA_REVISION}"
        raise Refused(Problem(where, what, "run `sftd init` with SFTD_DATABASE_URL set to it"))


def _shown(store: Store) -> str:
    return shown_url(str(store.engine.url))
