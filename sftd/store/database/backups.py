"""Backups of SQLite files: a checked copy of a database that may be in use, and a checked copy in the place of a database."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from sftd.domain.errors import SftdError

_BUSY_SECONDS = 5.0


class BackupFailed(SftdError):
    """A database file could not be copied, is damaged, or is in use."""


def client_url(url: str) -> str:
    """The URL of a PostgreSQL database for its own tools (`pg_dump`), without secrets."""
    parsed = sa.make_url(url)
    secrets = [name for name in parsed.query if "pass" in name]
    bare = parsed.difference_update_query(secrets).set(drivername="postgresql")
    # Not `set`, which takes None for "unchanged".
    return bare._replace(password=None).render_as_string(hide_password=False)


def write(source: Path, target: Path) -> int:
    """Write one consistent snapshot of a database, which may be in use, to the new file `target`: mode 0600, checked, on the
    disk when this returns; the whole file or none. Returns its bytes. Raises `BackupFailed` or `OSError`."""
    with _new_file(target) as partial:
        try:
            with closing(_connect(source)) as connection:
                connection.execute("VACUUM INTO ?", (str(partial),))
        except sqlite3.Error as error:
            raise BackupFailed(f"{source}: {error}") from None
        check_integrity(partial)
        _fsync(partial)
        # Not a rename, which would replace a file that was made meanwhile.
        os.link(partial, target)
        _fsync(target.parent)
    return target.stat().st_size


def check_integrity(file: Path) -> None:
    """Raises `BackupFailed` when SQLite finds damage in a file."""
    try:
        with closing(_connect(file)) as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupFailed(f"{file} cannot be read: {error}") from None
    if found != "ok":
        raise BackupFailed(f"{file} is damaged: {found}")


@contextmanager
def staged(backup: Path, database: Path) -> Iterator[Path]:
    """A checked copy of a backup in the folder of `database`, for `put`; removed at the end unless it was put. A backup may
    be a plain copy of SQLite's files: with FILE-wal beside it, that is a part of it. Raises `BackupFailed` or `OSError`."""
    with _new_file(database) as partial:
        shutil.copyfile(backup, partial)
        if (log := _beside(backup, "-wal")).exists():
            shutil.copyfile(log, _beside(partial, "-wal"))
        check_integrity(partial)
        yield partial


def put(new: Path, database: Path) -> Path | None:
    """Put the file `new` in the place of `database`, at once and on the disk. The replaced database is kept beside it, whole:
    returns its new path, None when there was none. Raises `BackupFailed` when a process uses either, `OSError`."""
    _close_log(new)
    kept = None
    if database.exists():
        kept = _beside(database, f".replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
        # A damaged file may still be what a person needs, and so may the log that SQLite keeps of it.
        with contextlib.suppress(sqlite3.DatabaseError):
            _close_log(database)
        os.link(database, kept)
    log = _beside(database, "-wal")
    if log.exists():
        # SQLite would replay it into the new file, which destroys that.
        log.rename(_beside(kept or database, "-wal" if kept else ".replaced-wal"))
    _beside(database, "-shm").unlink(missing_ok=True)
    _fsync(new)
    new.rename(database)
    _fsync(database.parent)
    return kept


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _connect(file: Path) -> sqlite3.Connection:
    """Never makes a file. By a URI, quoted: a path may hold anything."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS)


def _close_log(file: Path) -> None:
    """Write SQLite's log into the file and have no log beside it. Raises `BackupFailed` when a process uses the file."""
    with closing(_connect(file)) as connection:
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise BackupFailed(f"{file} is in use by another process") from None


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """An empty file of mode 0600 beside `path`, removed at the end with what SQLite made beside it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        yield partial
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            _beside(partial, suffix).unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
