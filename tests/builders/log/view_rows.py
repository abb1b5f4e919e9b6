"""Every row of the views, to compare before and after they are folded again."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sftd.projections import views
from sftd.store.database.engine import open_engine


def view_rows(url: str | sa.URL) -> list[tuple[Any, ...]]:
    engine = open_engine(sa.make_url(url).render_as_string(hide_password=False))
    try:
        with engine.connect() as connection:
            return [
                (table.name, *row)
                for table in views.TABLES
                for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            ]
    finally:
        engine.dispose()
