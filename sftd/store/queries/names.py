"""Names of runs for a shell that completes them at a key press. Asked of the driver: importing SQLAlchemy takes longer than
the rest."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sftd.settings import sqlite_file

# Ids, then what else names runs. A name with a space in it is several words to a shell.
_SQL = (
    "SELECT run_id, status FROM (SELECT run_id, status FROM view_runs WHERE substr(run_id, 1, {mark}) = {mark} "
    "ORDER BY submitted_at DESC, run_id LIMIT {mark}) AS ids "
    "UNION ALL SELECT DISTINCT name, 'name' FROM view_runs WHERE substr(name, 1, {mark}) = {mark} "
    "AND name <> {mark} AND replace(name, ' ', '') = name "
    "UNION ALL SELECT DISTINCT sweep, 'sweep' FROM view_variants WHERE substr(sweep, 1, {mark}) = {mark} AND sweep <> {mark}"
)
# A person does not wait longer for a completion.
_SECONDS = 2


def run_names(database_url: str, prefix: str, limit: int) -> list[tuple[str, str]]:
    """The newest runs whose ids begin with `prefix`: (id, status); then names and sweeps that do, which have "name" or "sweep"
    for a status, if there is a prefix. Empty when the database cannot be asked; it is neither made nor changed."""
    begins = (len(prefix), prefix)
    # With nothing typed, ids are offered alone: every name begins with nothing.
    other = (*begins, "") if prefix else (1, "", "")
    values = (*begins, limit, *other, *other)
    if database_url.startswith("sqlite"):
        return _of_sqlite(sqlite_file(database_url), values)
    return _of_postgres(database_url.replace("+psycopg", "", 1), values)


def _of_sqlite(path: Path | None, values: tuple[int | str, ...]) -> list[tuple[str, str]]:
    import sqlite3

    if path is None or not path.is_file():
        return []
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(path, timeout=_SECONDS)) as connection,
    ):
        return [(run_id, status) for run_id, status in connection.execute(_SQL.format(mark="?"), values)]
    return []


def _of_postgres(url: str, values: tuple[int | str, ...]) -> list[tuple[str, str]]:
    try:
        import psycopg
    except ImportError:
        return []
    with contextlib.suppress(psycopg.Error), psycopg.connect(url, connect_timeout=_SECONDS) as connection:
        return [(run_id, status) for run_id, status in connection.execute(_SQL.format(mark="%s"), values)]
    return []
