"""The whole schema, to make or compare tables: `tables`, and what only one dialect has.

It is a module of its own because naming a dialect imports it, which is a twentieth of the time of `sftd ls`.
"""

from __future__ import annotations

import sqlalchemy as sa

from sftd.store.database.tables import NO_STEP, events, metadata

__all__ = ["metadata"]

sa.Index(
    "ix_events_history", events.c.run_id, events.c.version, postgresql_where=NO_STEP, sqlite_where=NO_STEP
)
# A deleted position must never be given out again: readers continue after the highest one that they saw.
events.dialect_options["sqlite"]["autoincrement"] = True
