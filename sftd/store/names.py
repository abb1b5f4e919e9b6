"""Names of runs for a shell that completes them at a key press. Asked of the driver: importing SQLAlchemy takes longer than
the rest."""

from __future__ import annotations

import contextlib
import os
from urllib.parse import unquote

_SQL = (
    "SELECT run_id, status FROM view_runs WHERE substr(run_id, 1, {mark}) = {mark} "
    "ORDER BY submitted_at DESC, run_id LIMIT {mark}"
)
# A person does not wait longer for a completion.
_SECONDS = 2


def run_names(database_url: str, prefix: str, limit: int) -> list[tuple[str, str]]:
    """The newest runs whose ids begin with `prefix`: (id, status). Empty when the database cannot be asked; it is neither
    made nor changed."""
    values = (len(prefix), prefix, limit)
    if database_url.startswith("sqlite"):
        return _of_sqlite(database_url.partition("///")[2], values)
    return _of_postgres(database_url.replace("+psycopg", "", 1), values)


def _of_sqlite(file: str, values: tuple[int, str, int]) -> list[tuple[str, str]]:
    import sqlite3

    path = unquote(file.partition("?")[0])
    if not os.path.isfile(path):
        return []
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(path, timeout=_SECONDS)) as connection,
    ):
        return [(run_id, status) for run_id, status in connection.execute(_SQL.format(mark="?"), values)]
    return []


def _of_postgres(url: str, values: tuple[int, str, int]) -> list[tuple[str, str]]:
    try:
        import psycopg
    except ImportError:
        return []
    with contextlib.suppress(psycopg.Error), psycopg.connect(url, connect_timeout=_SECONDS) as connection:
        return [(run_id, status) for run_id, status in connection.execute(_SQL.format(mark="%s"), values)]
    return []
