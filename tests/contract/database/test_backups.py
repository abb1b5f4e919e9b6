"""`sftd db backup` and `sftd db restore`: what is put back is what was backed up, whatever SQLite left beside it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.daemon.lock import DaemonLock
from sftd.launcher import processes
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts
from sftd.projections import views
from sftd.store.database import backups
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.file import DatabaseExchanged, DatabaseFile
from sftd.store.database.migrate import upgrade
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.directory import RunDir
from sftd.wire.preflight import Preflight
from tests.builders.log.attempts import lines
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC
from tests.builders.patience import PATIENCE

# All that a path may hold, and a URL would read otherwise.
ODD = "a home % with ? #äé 'quotes'"


class Home:
    """A home with its own SQLite database, and the command line on it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.database = path / "sftd.db"
        self.mlflow = path / "mlflow.db"
        self.folder = path.parent / "backups"
        self.folder.mkdir()
        for name in ("SFTD_DATABASE_URL", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SFTD_HOME", str(path))

    def sftd(self, *arguments: object, check: int = 0) -> Any:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == check, done.output
        return done

    def open(self) -> Store:
        return Store(backups_engine(self.database), before_commit=(views.catch_up,))

    def submit(self, claim: bool = False) -> str:
        """Queue a run; with `claim`, also have a dead daemon drive it, which recorded two steps."""
        store = self.open()
        run_id = submit_all(store, CONTEXT, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")[0]
        if claim:
            with store.write(appends=False) as tx:
                row = DaemonRow("d", processes.host_name(), 1, 1.1, str(self.path), '{"cpus":2}', 1, 1)
                daemons.register(tx, row)
            found = attempts.claim(
                store, CONTEXT, daemon="d", host=row.host, fits=lambda entry: True, lease_micros=LEASE
            )
            assert found is not None
            attempts.record(store, CONTEXT, found.lease, lines(step(1), step(2)), 20, {})
        store.engine.dispose()
        return run_id

    def listed(self) -> list[str]:
        return sorted(row["run_id"] for row in msgspec.json.decode(self.sftd("ls", "--json").stdout))

    def replaced(self, name: str = "sftd.db") -> Path:
        (kept,) = (p for p in self.path.glob(f"{name}.replaced-*") if not p.name.endswith("-wal"))
        return kept


def backups_engine(file: Path) -> sa.Engine:
    from sftd.store.database.engine import open_file

    file.parent.mkdir(exist_ok=True)
    file.touch(mode=0o600)
    engine = open_file(file)
    upgrade(engine)
    return engine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


CRASH = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("CREATE TABLE of_the_crash (filler TEXT)")
connection.execute("INSERT INTO of_the_crash VALUES (?)", ("x" * 500_000,))
connection.commit()
os.kill(os.getpid(), 9)
"""


def crash(database: Path) -> None:
    """Leave a write-ahead log, as a killed daemon does."""
    done = subprocess.run([sys.executable, "-c", CRASH, str(database)], timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    assert database.with_name(database.name + "-wal").stat().st_size > 0


def test_a_backup_is_put_back_over_what_a_crash_left(home: Home) -> None:
    """A plain copy over the file would have SQLite replay the log of the old one into it, and destroy it."""
    first = home.submit()
    done = home.sftd("db", "backup", home.folder / "one.db")
    assert "checked" in done.stdout
    second = home.submit()
    crash(home.database)
    done = home.sftd("db", "restore", home.folder / "one.db")
    assert home.listed() == [first]
    assert home.sftd("db", "check").stdout == "OK: 1 run, 1 event\n"
    # The replaced database is whole, with what stood in its log alone.
    kept = home.replaced()
    assert str(kept) in done.stdout
    with sqlite3.connect(kept) as connection:
        assert connection.execute("SELECT count(*) FROM of_the_crash").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM view_runs").fetchone() == (2,)
    connection.close()
    # And can be put back itself.
    home.sftd("db", "restore", kept)
    assert home.listed() == sorted([first, second])


def test_a_damaged_database_is_replaced_and_kept(home: Home) -> None:
    run_id = home.submit()
    home.sftd("db", "backup", home.folder / "one.db")
    home.database.write_bytes(b"not a database at all" * 1000)
    said = home.sftd("ls", check=1).output
    assert "sftd db restore FILE" in said
    home.sftd("db", "restore", home.folder / "one.db")
    assert home.listed() == [run_id]
    assert home.replaced().read_bytes().startswith(b"not a database")


def test_the_database_is_gone(home: Home) -> None:
    run_id = home.submit()
    home.sftd("db", "backup", home.folder / "one.db")
    home.database.unlink()
    home.sftd("db", "restore", home.folder / "one.db")
    assert home.listed() == [run_id]


def test_files_are_private_and_nothing_else_is_left(home: Home) -> None:
    home.submit()
    umask = os.umask(0)
    try:
        home.sftd("db", "backup", home.folder / "one.db")
        home.sftd("db", "restore", home.folder / "one.db")
    finally:
        os.umask(umask)
    assert [p.name for p in home.folder.iterdir()] == ["one.db"]
    names = sorted(p.name.partition(".replaced-")[0] for p in home.path.iterdir())
    assert names == ["daemon.lock", "sftd.db", "sftd.db"]
    assert {oct(p.stat().st_mode & 0o777) for p in (*home.folder.iterdir(), *home.path.glob("sftd.db*"))} == {
        "0o600"
    }


def test_a_plain_copy_of_all_files_of_sqlite_can_be_restored(home: Home) -> None:
    """The manual way: `cp sftd.db* FOLDER` with the daemon stopped."""
    run_id = home.submit()
    crash(home.database)
    for path in home.path.glob("sftd.db*"):
        shutil.copy(path, home.folder / path.name)
    home.database.unlink()
    home.sftd("db", "restore", home.folder / "sftd.db")
    assert home.listed() == [run_id]
    with sqlite3.connect(home.database) as connection:
        assert connection.execute("SELECT count(*) FROM of_the_crash").fetchone() == (1,)
    connection.close()


def test_mlflows_database_goes_along(home: Home) -> None:
    home.submit()
    for value in ("before", "after"):
        with sqlite3.connect(home.mlflow) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS said (value TEXT)")
            connection.execute("INSERT INTO said VALUES (?)", (value,))
        connection.close()
        if value == "before":
            home.sftd("db", "backup", home.folder / "one.db")
    assert sorted(p.name for p in home.folder.iterdir()) == ["one.db", "one.db.mlflow"]
    home.sftd("db", "restore", home.folder / "one.db")
    with sqlite3.connect(home.mlflow) as connection:
        assert connection.execute("SELECT value FROM said").fetchall() == [("before",)]
    connection.close()
    (home.folder / "one.db.mlflow").unlink()
    done = home.sftd("db", "restore", home.folder / "one.db")
    assert "`sftd mlflow check` compares it" in done.stderr


def test_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / ODD, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    store = home.open()
    store.engine.dispose()
    file = home.folder / f"{ODD}.db"
    assert backups.write(home.database, file) > 0
    with backups.staged(file, home.database) as new:
        kept = backups.put(new, home.database)
    assert kept is not None
    backups.check_integrity(kept)
    backups.check_integrity(home.database)


def _execute(file: Path, statement: str) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute(statement)
    connection.close()


def _other_program(file: Path) -> None:
    file.unlink()
    _execute(file, "CREATE TABLE alembic_version (version_num TEXT)")


DAMAGED: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "overwritten": lambda file: file.write_bytes(
        file.read_bytes()[:8192].ljust(file.stat().st_size, b"\xa5")
    ),
    "of another program": _other_program,
    "of a newer sftd": lambda file: _execute(file, "UPDATE alembic_version SET version_num = '9999'"),
    "without an event": lambda file: _execute(file, "DELETE FROM events WHERE version = 2"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_backup_is_checked_before_anything_is_changed(home: Home, damage: str) -> None:
    home.submit(claim=True)
    file = home.folder / "one.db"
    home.sftd("db", "backup", file)
    DAMAGED[damage](file)
    before = home.database.read_bytes()
    done = CliRunner().invoke(main, ["db", "restore", str(file)])
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    assert home.database.read_bytes() == before
    assert sorted(p.name for p in home.path.iterdir()) == ["daemon.lock", "sftd.db"]
    if damage == "without an event":
        assert "--force" in done.stderr
        assert "1 run," in home.sftd("db", "restore", file, "--force").stdout


def test_an_existing_file_is_not_overwritten(home: Home) -> None:
    home.submit()
    home.sftd("db", "backup", home.folder / "one.db")
    assert "exists already" in home.sftd("db", "backup", home.folder / "one.db", check=2).stderr
    assert "there is no folder" in home.sftd("db", "backup", home.folder / "none" / "x.db", check=2).stderr
    assert "there is no file" in home.sftd("db", "restore", home.folder / "none.db", check=2).stderr
    assert "is the database itself" in home.sftd("db", "restore", home.database, check=2).stderr


def test_a_restore_is_refused_beside_what_uses_the_database(home: Home) -> None:
    run_id = home.submit()
    file = home.folder / "one.db"
    home.sftd("db", "backup", file)
    with DaemonLock(home.path / "daemon.lock"):
        assert "sftd daemon --stop" in home.sftd("db", "restore", file, check=2).stderr
    directory = RunDir(home.path, run_id).attempt(1)
    directory.path.mkdir(parents=True)
    rank = subprocess.Popen(
        ["sleep", "600"], cwd=directory.path, env={TOKEN_VARIABLE: "t", "PATH": os.environ["PATH"]}
    )
    try:
        said = home.sftd("db", "restore", file, check=2).stderr
        assert run_id in said
        assert f"kill -9 {rank.pid}" in said
    finally:
        rank.kill()
        rank.wait()
    reader = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); print(c.execute('SELECT 1 FROM events').fetchall()); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", reader, str(home.database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert f"pid {other.pid}" in home.sftd("db", "restore", file, check=2).stderr
        # Also one that cannot be seen from here, such as in another container.
        with backups.staged(file, home.database) as new, pytest.raises(backups.BackupFailed, match="in use"):
            backups.put(new, home.database)
        other.communicate(b"\n", timeout=PATIENCE)
    home.sftd("db", "restore", file)


def test_what_the_restored_log_does_not_know_is_said(home: Home) -> None:
    run_id = home.submit(claim=True)
    file = home.folder / "one.db"
    home.sftd("db", "backup", file)
    newer = RunDir(home.path, run_id).checkpoint_dir("") / "step-00000003"
    newer.mkdir(parents=True)
    (newer / "manifest.json").write_bytes(msgspec.json.encode({"run_id": run_id}))
    RunDir(home.path, run_id).attempt(2).path.mkdir()
    RunDir(home.path, "later-run-1234").path.mkdir()
    said = home.sftd("db", "restore", file).stdout
    assert (
        f"{run_id}: its checkpoint of step 3 is newer than the restored log and is not used: {newer}" in said
    )
    assert "later-run-1234: has a folder here, but the restored log lacks the run" in said
    assert f"{run_id}: the restored log lacks attempt 2" in said
    assert f"{run_id}: the next daemon reads the rest of attempt 1's journal" in said


def test_postgresql_has_its_own_tools(
    postgres_server: sa.URL, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_server.set(username="ada", password="hush-hush").render_as_string(hide_password=False)
    monkeypatch.setenv("SFTD_DATABASE_URL", url)
    said = home.sftd("db", "backup", "one.dump", check=2).stderr
    assert "pg_dump --format=custom --file=one.dump postgresql://ada@" in said.replace("'", "")
    assert "hush-hush" not in said
    assert "pg_restore --clean" in home.sftd("db", "restore", "one.dump", check=2).stderr


@pytest.fixture
def in_use(tmp_path: Path) -> Iterator[tuple[Path, sa.Engine]]:
    """A database with a connection to it, as a daemon has one."""
    file = tmp_path / "sftd.db"
    engine = open_engine(f"sqlite:///{file}")
    upgrade(engine)
    yield file, engine
    engine.dispose()


def test_a_file_that_was_exchanged_is_noticed_before_sqlite_destroys_the_new_one(
    in_use: tuple[Path, sa.Engine], tmp_path: Path
) -> None:
    file, engine = in_use
    backups.write(file, tmp_path / "backup.db")
    watched = DatabaseFile(file)
    watched.check()
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO projection_positions VALUES ('x', 1)")
    watched.check()
    os.replace(tmp_path / "backup.db", file)
    with pytest.raises(DatabaseExchanged, match="replaced by another file"):
        watched.check()
    engine.dispose()
    backups.check_integrity(file)
    assert len(list(tmp_path.glob("sftd.db.exchanged-*-wal"))) == 1
    with pytest.raises(DatabaseExchanged):
        watched.check()
    file.unlink()
    with pytest.raises(DatabaseExchanged, match="removed"):
        watched.check()
