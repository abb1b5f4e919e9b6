"""Names of runs for shell completion. Uses the database drivers directly, because importing SQLAlchemy takes longer than the
query."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sftd.settings import sqlite_file

# Ids, then names and sweeps. Names with spaces are left out: the shell would split them into words.
_SQL = (
    "SELECT run_id, status FROM (SELECT run_id, status FROM view_runs WHERE substr(run_id, 1, {mark}) = {mark} "
    "ORDER BY submitted_at DESC, run_id LIMIT {mark}) AS ids "
    "UNION ALL SELECT DISTINCT name, 'name' FROM view_runs WHERE substr(name, 1, {mark}) = {mark} "
    "AND name <> {mark} AND replace(name, ' ', '') = name "
    "UNION ALL SELECT DISTINCT sweep, 'sweep' FROM view_variants WHERE substr(sweep, 1, {mark}) = {mark} AND sweep <> {mark}"
)
# Users do not wait longer for a completion.
_SECONDS = 2


def run_names(database_url: str, prefix: str, limit: int) -> list[tuple[str, str]]:
    """(id, status) of the newest runs whose ids begin with `prefix`. With a non-empty prefix, then (name, "name") and
    (sweep, "sweep") of matching names and sweeps. Empty when the database cannot be read. Never creates or changes a database."""
    begins = (len(prefix), prefix)
    # Without a prefix, offer only ids: every name would match. The condition (1, "") matches none.
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
