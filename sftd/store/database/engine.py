"""Open a database. Everything in which SQLite and PostgreSQL differ is here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sftd.domain.errors import DatabaseNotReady, SftdError
from sftd.domain.log.events import Micros, Recorded
from sftd.store.database.tables import SCHEMA_REVISION, events

_WRITE = "sftd_write"
# Serialises appends on PostgreSQL, so that position order is commit order. The number is arbitrary: "sftd" in ASCII.
_APPEND_LOCK = 0x73667464
_BUSY_SECONDS = 30.0
# A process that freezes in the middle of a write holds the append lock or rows of the queue. After this time the server
# ends its session and rolls back, and other processes continue. The limit does not apply on SQLite or during a COPY, which
# the server does not count as idle: there the operator must kill the process. Readers block no other process and have no limit.
IDLE_SECONDS = 30.0
# Without these, libpq waits forever for an unreachable host.
_TIMEOUTS = {"connect_timeout": "10", "tcp_user_timeout": "30000"}
# (connection, this host's time) → the time that the queue and the leases use.
Clock = Callable[[sa.Connection, Micros], Micros]


class DatabaseUnreachable(SftdError):
    """The database cannot be opened."""


def shown_url(url: str) -> str:
    """A database URL without its password."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        return "(not a database URL)"
    is_file = parsed.get_backend_name() == "sqlite"
    if not is_file and "@" in f"{parsed.host}{parsed.database}":
        return "(no database URL: a / or @ in its password must be written as %2F or %40)"
    # libpq also accepts secrets as query parameters.
    hidden = {name: "***" for name in parsed.query if "pass" in name}
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def open_engine(url: str) -> sa.Engine:
    """Make an engine. A missing SQLite file is created with mode 0600 in a folder of mode 0700. Raises `DatabaseUnreachable`."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise DatabaseUnreachable(
            "SFTD_DATABASE_URL is not a database URL such as postgresql://user@host/name"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    if parsed.get_backend_name() == "postgresql":
        try:
            return _open_postgresql(parsed)
        except ModuleNotFoundError as error:
            raise DatabaseUnreachable(f"{error}: install it with `pip install 'psycopg[binary]'`") from None
        except sa.exc.NoSuchModuleError as error:
            raise DatabaseUnreachable(f"{shown_url(url)}: {error}") from None
    raise DatabaseUnreachable(f"{shown_url(url)}: only SQLite and PostgreSQL are supported")


def _open_postgresql(url: sa.URL) -> sa.Engine:
    timeouts = {name: value for name, value in _TIMEOUTS.items() if name not in url.query}
    return sa.create_engine(url, pool_pre_ping=True, connect_args=timeouts)


def _open_sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise DatabaseUnreachable("the database must be a file: several processes share it")
    path = Path(url.database)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    return _sqlite_engine(url)


def open_file(path: Path) -> sa.Engine:
    """Make an engine on an existing SQLite file."""
    return _sqlite_engine(sa.URL.create("sqlite", database=str(path)))


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A deferred transaction that reads and then writes fails with "database is locked" when another process writes.
        write = connection.get_execution_options().get(_WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def insert(engine_or_connection: sa.Engine | sa.Connection, table: sa.Table) -> Any:
    """An INSERT of the current dialect, which supports ON CONFLICT."""
    # Imported here because it is slow, and commands that only read, such as `sftd ls`, do not need it.
    if engine_or_connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def insert_rows(
    connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]
) -> None:
    """Insert rows, whose values are in the order of `columns`, by the fastest method of each driver: two to three times as
    fast as SQLAlchemy's INSERT."""
    names = ", ".join(f'"{name}"' for name in columns)
    if connection.dialect.name != "postgresql":
        marks = ", ".join("?" * len(columns))
        if given := list(rows):
            connection.exec_driver_sql(f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})', given)  # noqa: S608
        return
    statement = f'COPY "{table.name}" ({names}) FROM STDIN'
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except connection.dialect.loaded_dbapi.Error as error:
        # The same exception that SQLAlchemy raises for its own statements.
        raise sa.exc.DBAPIError.instance(
            statement, None, error, connection.dialect.loaded_dbapi.Error
        ) from error


def shared_clock(connection: sa.Connection, local: Micros) -> Micros:
    """The time that the queue and the leases use: on PostgreSQL the server's, because hosts that share it have different
    clocks; on SQLite `local`, the time of its only host."""
    if connection.dialect.name != "postgresql":
        return local
    # now() is the start of the transaction, which may have waited for the append lock since then.
    return int(connection.execute(_SERVER_TIME).scalar_one())


_SERVER_TIME = sa.text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)")


class Tx:
    """A write transaction. `appended` are the events that it appended."""

    def __init__(self, connection: sa.Connection, clock: Clock) -> None:
        self.connection = connection
        self.appended: list[Recorded] = []
        self._clock = clock

    def now(self, local: Micros) -> Micros:
        """The time that the queue and the leases use (see `shared_clock`). `local` is this host's time."""
        return self._clock(self.connection, local)

    def execute(self, statement: Any, parameters: Any = None) -> sa.CursorResult[Any]:
        """Run one statement."""
        return self.connection.execute(statement, parameters)


class Store:
    """A database. The `before_commit` functions run inside each transaction that appended events; they keep the views equal
    to the log. Tests replace `clock`."""

    def __init__(
        self,
        engine: sa.Engine,
        before_commit: tuple[Callable[[Tx], object], ...] = (),
        clock: Clock = shared_clock,
    ) -> None:
        self.engine = engine
        self.before_commit = before_commit
        self.clock = clock

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction: one consistent snapshot."""
        options = {"isolation_level": "REPEATABLE READ"} if self.engine.dialect.name == "postgresql" else {}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, *, appends: bool = True, may_idle: bool = False) -> Iterator[Tx]:
        """A write transaction. `appends=False` is for transactions that append no events, such as lease renewals. `may_idle`
        lifts the server's idle limit; use it only for a database that no other process uses yet."""
        with self.engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
            if self.engine.dialect.name == "postgresql":
                idle = "0" if may_idle else f"{round(IDLE_SECONDS * 1000)}ms"
                first = [sa.func.set_config("idle_in_transaction_session_timeout", idle, True)]
                if appends:
                    first.append(sa.func.pg_advisory_xact_lock(_APPEND_LOCK))
                connection.execute(sa.select(*first))
            tx = Tx(connection, self.clock)
            yield tx
            if tx.appended:
                for function in self.before_commit:
                    function(tx)

    def check_schema(self) -> None:
        """Raises `DatabaseNotReady` when the tables are missing or of another version, `DatabaseUnreachable` when
        the server does not answer."""
        found = self.schema_revision()
        if found is None:
            raise DatabaseNotReady(
                f"{shown_url(str(self.engine.url))} has no sftd tables yet. Run `sftd init`."
            )
        if found != SCHEMA_REVISION:
            raise DatabaseNotReady(
                f"{shown_url(str(self.engine.url))} has tables of revision {found}, this sftd needs {SCHEMA_REVISION}. "
                + (
                    "Run `sftd init`."
                    if found < SCHEMA_REVISION
                    else "A newer sftd has changed them: use that one."
                )
            )

    def has_log(self) -> bool:
        """Whether the events table exists. `alembic_version` proves nothing: other programs also create it."""
        return sa.inspect(self.engine).has_table(events.name)

    def schema_revision(self) -> str | None:
        """The Alembic revision of the tables, or None when there are none. Raises `DatabaseUnreachable`."""
        try:
            with self.engine.connect() as connection:
                return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        except sa.exc.ProgrammingError as error:
            # 42P01 is PostgreSQL's "undefined table".
            if getattr(error.orig, "sqlstate", None) == "42P01":
                return None
            raise DatabaseUnreachable(
                f"{shown_url(str(self.engine.url))} cannot be read: {error.orig}"
            ) from None
        except sa.exc.OperationalError as error:
            if "no such table" in str(error):
                return None
            reason = str(error.orig).strip().splitlines()[0]
            raise DatabaseUnreachable(
                f"{shown_url(str(self.engine.url))} does not answer: {reason}"
            ) from None
        except sa.exc.DatabaseError as error:
            fix = (
                ". Stop the daemon and put a backup in its place: `sftd db restore FILE`"
                if self.engine.dialect.name == "sqlite"
                else ""
            )
            raise DatabaseUnreachable(
                f"{shown_url(str(self.engine.url))} cannot be read: {error.orig}{fix}"
            ) from None
