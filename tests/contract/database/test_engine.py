"""Opening databases: what is refused, what a file looks like, what a person reads when it does not work."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from sftd.domain.errors import DatabaseNotReady
from sftd.store.database.engine import DatabaseUnreachable, Store, open_engine, shown_url
from sftd.store.database.tables import SCHEMA_REVISION


def test_a_database_without_tables_is_not_ready(empty_engine: sa.Engine) -> None:
    store = Store(empty_engine)
    assert store.schema_revision() is None
    with pytest.raises(DatabaseNotReady, match="no sftd tables yet"):
        store.check_schema()


def test_a_database_with_the_tables_is_ready(store: Store) -> None:
    store.check_schema()


def test_tables_of_another_revision_are_told(store: Store) -> None:
    with store.write() as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(
        DatabaseNotReady, match=f"revision 9999, this sftd needs {SCHEMA_REVISION}. A newer sftd"
    ):
        store.check_schema()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "is not a database URL"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("mysql://root:secret@host/db", "only SQLite and PostgreSQL"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, says: str) -> None:
    with pytest.raises(DatabaseUnreachable, match=says) as refused:
        open_engine(url)
    assert "secret" not in str(refused.value)


def test_a_server_that_does_not_answer_is_told_without_its_password(tmp_path: Path) -> None:
    engine = open_engine(f"postgresql+psycopg://u:secret@/db?host={tmp_path}")
    with pytest.raises(DatabaseUnreachable, match="does not answer") as refused:
        Store(engine).check_schema()
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, but long enough to be taken for one " * 50)
    engine = open_engine(f"sqlite:///{tmp_path}/x.db")
    with pytest.raises(DatabaseUnreachable):
        Store(engine).check_schema()
    engine.dispose()


def test_a_password_is_never_shown() -> None:
    assert shown_url("postgresql+psycopg://u:secret@host/db") == "postgresql+psycopg://u:***@host/db"
    assert shown_url("::") == "(not a database URL)"


def test_a_sqlite_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "sftd.db"
    engine = open_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    engine.dispose()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
