"""The whole schema, for whoever makes or compares tables: those of `tables`, and what only one dialect knows of them.

It stands apart because a table that names a dialect imports it, and that takes `sftd ls` the twentieth part of its time.
"""

from __future__ import annotations

import sqlalchemy as sa

from sftd.store.database.tables import NO_STEP, events, metadata

__all__ = ["metadata"]

sa.Index(
    "ix_events_history", events.c.run_id, events.c.version, postgresql_where=NO_STEP, sqlite_where=NO_STEP
)
# A deleted position must never be given out again: readers continue behind the highest they saw.
events.dialect_options["sqlite"]["autoincrement"] = True
