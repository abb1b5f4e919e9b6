"""The whole schema, for migrations: `tables` plus the options of single dialects.

These are apart from `tables` because naming a dialect imports it, which takes 5 % of the time of `sftd ls`.
"""

from __future__ import annotations

import sqlalchemy as sa

from sftd.store.database.tables import NO_STEP, events, metadata

__all__ = ["metadata"]

sa.Index(
    "ix_events_history", events.c.run_id, events.c.version, postgresql_where=NO_STEP, sqlite_where=NO_STEP
)
# A deleted position must never be reused: readers continue after the highest position that they have read.
events.dialect_options["sqlite"]["autoincrement"] = True
