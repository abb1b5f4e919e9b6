"""Detect that the SQLite file of a long-lived process was replaced or removed while it was open."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from sftd.domain.errors import SftdError


class DatabaseExchanged(SftdError):
    """The database file was replaced or removed while it was in use."""


class DatabaseFile:
    """The identity of the database file at `path` when this object was created."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = path.with_name(path.name + "-wal")
        self._identity = _identity(path)
        self._log_identity = _identity(self._log)

    def check(self) -> None:
        """Raises `DatabaseExchanged` when the path has another file or none: writes would be lost with the old file.

        Before that, renames SQLite's log of the old file, which SQLite would otherwise replay into the new file and corrupt it.
        """
        found = _identity(self._path)
        log = _identity(self._log)
        if found == self._identity:
            self._log_identity = log
            return
        what = "removed" if found is None else "replaced by another file"
        aside = ""
        if log is not None and log == self._log_identity:
            kept = self._path.with_name(
                f"{self._path.name}.exchanged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}-wal"
            )
            self._log.rename(kept)
            self._path.with_name(self._path.name + "-shm").unlink(missing_ok=True)
            aside = f" SQLite's log of the old file is kept as {kept}."
        raise DatabaseExchanged(
            f"{self._path} was {what} while this daemon used it.{aside} fix: check the file with `sftd db check`, or put a "
            "backup in its place with `sftd db restore FILE`; then start a daemon"
        )


def watch(url: sa.URL) -> DatabaseFile | None:
    """The file of an SQLite database; None for a server."""
    return DatabaseFile(Path(url.database)) if url.get_backend_name() == "sqlite" and url.database else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
