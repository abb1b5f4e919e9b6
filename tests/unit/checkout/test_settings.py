"""Databases are files: whatever characters a path holds, the file lies where the path says."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from sftd import settings
from sftd.store.database.engine import open_engine

ODD = ["plain", "a%41b", "h?x=1", "h#y", "two words", "läuft", 'it\'s "quoted"', "100%", "a&b+c;d", "[x]{y}"]


@pytest.mark.parametrize("name", ODD)
def test_both_databases_lie_in_the_home(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    found = settings.read({"SFTD_HOME": str(home)})
    for url, file in ((found.database_url, "sftd.db"), (found.mlflow_tracking_uri, "mlflow.db")):
        assert settings.sqlite_file(url) == home / file
        assert sa.make_url(url).database == str(home / file)
    engine = open_engine(found.database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    engine.dispose()
    assert list(tmp_path.rglob("*.db")) == [home / "sftd.db"]


@pytest.mark.parametrize("name", ODD)
def test_a_relative_file_is_made_absolute_in_an_odd_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    url = settings.full_database_url("sqlite:///logs/x.db?timeout=5")
    assert settings.sqlite_file(url) == folder / "logs/x.db"
    assert sa.make_url(url).query == {"timeout": "5"}


def test_the_url_of_an_ordinary_path_is_what_it_was() -> None:
    """The mirror's position in the log is known by a digest of this text."""
    assert (
        settings.sqlite_url(Path("/home/ada lovelace/.sftd/ö/mlflow.db"))
        == "sqlite:////home/ada lovelace/.sftd/ö/mlflow.db"
    )


@pytest.mark.parametrize(
    "url", ["postgresql://ada@host/sftd", "sqlite://", "sqlite:///:memory:", "http://host/"]
)
def test_what_is_not_a_file_has_none(url: str) -> None:
    assert settings.sqlite_file(url) is None
    assert settings.full_database_url(url).replace("+psycopg", "") == url


def test_cpu_slots_are_all_cores_unless_set() -> None:
    assert settings.read({}).cpu_slots is None
    assert settings.read({"SFTD_CPU_SLOTS": "3"}).cpu_slots == 3
    with pytest.raises(settings.SettingsError, match="SFTD_CPU_SLOTS"):
        settings.read({"SFTD_CPU_SLOTS": "none"})
