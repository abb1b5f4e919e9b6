"""The migrations make exactly the tables that the code uses, from any state, also when others migrate at the same time."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from sftd.domain.errors import DatabaseNotReady
from sftd.domain.run.identity import Identity
from sftd.store.database import migrate
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.schema import metadata
from sftd.store.database.tables import SCHEMA_REVISION
from sftd.store.queue import daemons
from tests.builders.paths import ROOT
from tests.builders.patience import PATIENCE

SCRIPTS = ScriptDirectory(str(ROOT / "migrations"))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]


@pytest.fixture
def fresh_engine(tmp_path: Path, empty_engine: sa.Engine) -> Iterator[sa.Engine]:
    """A second empty database of the same kind."""
    if empty_engine.dialect.name == "sqlite":
        engine = open_engine(f"sqlite:///{tmp_path}/second.db")
        yield engine
        engine.dispose()
        return
    schema = "second"
    with empty_engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(schema))
    options = {"options": f"-csearch_path={schema}"}
    engine = sa.create_engine(empty_engine.url, connect_args=options)
    yield engine
    engine.dispose()


def schema_of(engine: sa.Engine) -> list[Any]:
    """The whole schema as the database describes it, without Alembic's own table."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            rows = connection.exec_driver_sql(
                "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE tbl_name != 'alembic_version' ORDER BY 1, 2"
            )
            return [[" ".join(str(v).split()) for v in row] for row in rows]
        columns = connection.exec_driver_sql(
            "SELECT table_name, ordinal_position, column_name, data_type, character_maximum_length, is_nullable,"
            " replace(column_default, 'second.', '') FROM information_schema.columns"
            " WHERE table_schema = current_schema() AND table_name != 'alembic_version' ORDER BY 1, 2"
        )
        indexes = connection.exec_driver_sql(
            "SELECT indexname, replace(replace(indexdef, 'second.', ''), 'public.', '') FROM pg_indexes"
            " WHERE schemaname = current_schema() AND tablename != 'alembic_version' ORDER BY 1"
        )
        constraints = connection.exec_driver_sql(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace ="
            " current_schema()::regnamespace AND conname NOT LIKE 'alembic%%' ORDER BY 1"
        )
        return [[tuple(row) for row in part] for part in (columns, indexes, constraints)]


def test_migrated_tables_are_the_tables_of_the_code(empty_engine: sa.Engine, fresh_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    metadata.create_all(fresh_engine)
    assert schema_of(empty_engine) == schema_of(fresh_engine)


def test_alembic_finds_nothing_to_change(empty_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        config = Config(ROOT / "alembic.ini", stdout=io.StringIO(), attributes={"connection": connection})
        command.check(config)


def test_the_code_needs_the_newest_revision() -> None:
    assert SCRIPTS.get_heads() == [SCHEMA_REVISION]


def test_upgrading_tells_what_it_did_and_does_it_once(empty_engine: sa.Engine) -> None:
    assert migrate.upgrade(empty_engine) == REVISIONS
    Store(empty_engine).check_schema()
    assert migrate.upgrade(empty_engine) == []


def test_every_revision_goes_up_down_and_up_again(empty_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    before = schema_of(empty_engine)
    migrate.downgrade(empty_engine, "base")
    assert sa.inspect(empty_engine).get_table_names() == ["alembic_version"]
    assert Store(empty_engine).schema_revision() is None
    migrate.upgrade(empty_engine)
    assert schema_of(empty_engine) == before


def test_a_log_is_carried_through_every_revision(empty_engine: sa.Engine) -> None:
    """Up and down again, with events in the tables: each row stays as it is, and positions continue after the last."""
    names = "event_id, run_id, version, type, schema_version, occurred_at, recorded_at, attempt, actor, causation_id, payload"

    def add(run_id: str, version: int, event_id: str) -> None:
        values = f"'{event_id}', '{run_id}', {version}, 'StepCompleted', 2, 5, 6, NULL, 'ä', NULL, '{{\"loss\":-0.0}}'"
        with empty_engine.begin() as connection:
            connection.execute(sa.text(f"INSERT INTO events ({names}) VALUES ({values})".replace(":", "\\:")))

    def log() -> list[Any]:
        with empty_engine.connect() as connection:
            return [
                tuple(row) for row in connection.exec_driver_sql("SELECT * FROM events ORDER BY position")
            ]

    migrate.upgrade(empty_engine)
    migrate.downgrade(empty_engine, REVISIONS[0])
    add("a", 1, "first")
    add("b", 1, "second")
    before = log()
    with pytest.raises(sa.exc.IntegrityError):
        add("b", 2, "first")
    assert migrate.upgrade(empty_engine) == REVISIONS[1:]
    assert log() == before
    add("a", 2, "third")
    for event_id, version in (("third", 3), ("fourth", 2)):
        with pytest.raises(sa.exc.IntegrityError):
            add("a", version, event_id)
    migrate.downgrade(empty_engine, REVISIONS[0])
    assert [row[1:4] for row in log()] == [("first", "a", 1), ("second", "b", 1), ("third", "a", 2)]
    assert [row[0] for row in log()] == sorted({row[0] for row in log()})
    migrate.upgrade(empty_engine)


def test_a_daemon_of_an_older_sftd_has_no_identity(empty_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    migrate.downgrade(empty_engine, "0005")
    with empty_engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO daemons (daemon_id, host, pid, create_time, home, devices, started_at, seen_at)"
            " VALUES ('old', 'host', 42, 1760000000.123456, '/home', '{}', 1, 2)"
        )
    migrate.upgrade(empty_engine)
    with Store(empty_engine).read() as connection:
        row = daemons.find(connection, "old")
    assert row is not None
    assert (row.create_time, row.seen_at, row.identity) == (1760000000.123456, 2, Identity())


def test_a_failed_upgrade_leaves_nothing(empty_engine: sa.Engine) -> None:
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE view_checkpoints (in_the_way INTEGER)")
    with pytest.raises(sa.exc.DatabaseError):
        migrate.upgrade(empty_engine)
    assert sa.inspect(empty_engine).get_table_names() == ["view_checkpoints"]


def test_tables_of_a_newer_sftd_are_left_alone(empty_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseNotReady, match="revision 9999, which this sftd does not support"):
        migrate.upgrade(empty_engine)
    assert Store(empty_engine).schema_revision() == "9999"


UPGRADE = """
import sys
from sftd.store.database.engine import open_engine
from sftd.store.database.migrate import upgrade
import alembic.command
print("ready", flush=True)
sys.stdin.readline()
print(upgrade(open_engine(sys.argv[1])), flush=True)
"""


def test_processes_that_upgrade_at_once_do_it_once(empty_database_url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE, empty_database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [error for _, error in done] == ["", "", ""]
    assert sorted(out for out, _ in done) == sorted(["[]\n", "[]\n", f"{REVISIONS}\n"])


def alembic(*arguments: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={"SFTD_DATABASE_URL": url, "SFTD_HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_alembics_own_command_works_in_a_checkout(empty_database_url: str, tmp_path: Path) -> None:
    # What people write; the settings put the driver in.
    url = empty_database_url.replace("postgresql+psycopg", "postgresql")
    done = alembic("upgrade", "head", url=url, home=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    engine = open_engine(empty_database_url)
    Store(engine).check_schema()
    engine.dispose()
    alembic("check", url=url, home=tmp_path)
    assert "CREATE TABLE events" in alembic("upgrade", "head", "--sql", url=url, home=tmp_path).stdout


def test_the_wheel_ships_the_migrations(tmp_path: Path) -> None:
    build = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    (made,) = build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(made) as wheel:
        names = set(wheel.namelist())
    assert {"sftd/migrations/env.py", "sftd/migrations/script.py.mako"} <= names
    shipped = {Path(n).name for n in names if n.startswith("sftd/migrations/versions/") and n.endswith(".py")}
    assert shipped == {p.name for p in (ROOT / "migrations/versions").glob("*.py")}
