"""Back up and restore SQLite files. Both directions verify the copy; the source may be in use."""

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
    """The URL that PostgreSQL's own tools (`pg_dump`) accept, without secrets."""
    parsed = sa.make_url(url)
    secrets = [name for name in parsed.query if "pass" in name]
    bare = parsed.difference_update_query(secrets).set(drivername="postgresql")
    # `set(password=None)` would leave the password unchanged.
    return bare._replace(password=None).render_as_string(hide_password=False)


def write(source: Path, target: Path) -> int:
    """Write a consistent snapshot of a database, which may be in use, to the new file `target`, atomically.

    The file has mode 0600 and is verified and synced when this returns. Returns its size in bytes.
    Raises `BackupFailed` or `OSError`.
    """
    with _new_file(target) as partial:
        try:
            with closing(_connect(source)) as connection:
                connection.execute("VACUUM INTO ?", (str(partial),))
        except sqlite3.Error as error:
            raise BackupFailed(f"{source}: {error}") from None
        check_integrity(partial)
        _fsync(partial)
        # A rename would replace a file that another process created in the meantime; a link fails.
        os.link(partial, target)
        _fsync(target.parent)
    return target.stat().st_size


def check_integrity(file: Path) -> None:
    """Raises `BackupFailed` when SQLite finds the file damaged or cannot read it."""
    try:
        with closing(_connect(file)) as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupFailed(f"{file} cannot be read: {error}") from None
    if found != "ok":
        raise BackupFailed(f"{file} is damaged: {found}")


@contextmanager
def staged(backup: Path, database: Path) -> Iterator[Path]:
    """Copy a backup into the folder of `database` and verify it, for `put`. Removes the copy on exit unless `put` used it.

    If FILE-wal exists beside the backup, it is part of the backup. Raises `BackupFailed` or `OSError`.
    """
    with _new_file(database) as partial:
        shutil.copyfile(backup, partial)
        if (log := _beside(backup, "-wal")).exists():
            shutil.copyfile(log, _beside(partial, "-wal"))
        check_integrity(partial)
        yield partial


def put(new: Path, database: Path) -> Path | None:
    """Replace `database` by the file `new`, atomically and synced. The old database is kept beside it.

    Returns the path of the old database, None when there was none. Raises `BackupFailed` when a process uses either
    file, and `OSError`.
    """
    _close_log(new)
    kept = None
    if database.exists():
        kept = _beside(database, f".replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
        # The user may still need a damaged file, so it is kept as it is, with its SQLite log.
        with contextlib.suppress(sqlite3.DatabaseError):
            _close_log(database)
        os.link(database, kept)
    log = _beside(database, "-wal")
    if log.exists():
        # SQLite would replay this log into the new file and corrupt it.
        log.rename(_beside(kept or database, "-wal" if kept else ".replaced-wal"))
    _beside(database, "-shm").unlink(missing_ok=True)
    _fsync(new)
    new.rename(database)
    _fsync(database.parent)
    return kept


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _connect(file: Path) -> sqlite3.Connection:
    """Open an existing file. The URI allows `mode=rw`, which never creates one, and quotes special characters."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS)


def _close_log(file: Path) -> None:
    """Write SQLite's log into the file and remove the log. Raises `BackupFailed` when a process uses the file."""
    with closing(_connect(file)) as connection:
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise BackupFailed(f"{file} is in use by another process") from None


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Create an empty file of mode 0600 beside `path`. On exit, remove it and the files that SQLite created for it."""
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
