"""Prepare for logs of ten million events.

- An event's id is unique within its run, not over all runs. Ids are random, so appends to an index over all of them touch
  random pages, and appending to a large log took three times as long. Within a run the entries are close together. This loses
  no safety: the id of a journal line depends on its run, and versions already order each stream.
- An index of the events that are not steps finds a run's history and checkpoints among a million steps.

On SQLite this copies the log once: about a minute for five million events.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# SQLite generates ids only for a column whose type is exactly INTEGER.
_POSITION = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_OF_RUN = ("uq_events_run_id_event_id", ["run_id", "event_id"])
_OF_ALL = ("uq_events_event_id", ["event_id"])
_COLUMNS = (
    "position, event_id, run_id, version, type, schema_version, occurred_at, recorded_at, attempt, actor, causation_id,"
    " payload"
)


def upgrade() -> None:
    """Make ids unique within a run; add the index of events that are not steps."""
    _make_unique(_OF_RUN, instead_of=_OF_ALL)
    no_step = sa.text("type <> 'StepCompleted'")
    op.create_index(
        "ix_events_history", "events", ["run_id", "version"], postgresql_where=no_step, sqlite_where=no_step
    )


def downgrade() -> None:
    """Revert the change."""
    op.drop_index("ix_events_history", "events")
    _make_unique(_OF_ALL, instead_of=_OF_RUN)


def _make_unique(new: tuple[str, list[str]], instead_of: tuple[str, list[str]]) -> None:
    if op.get_context().dialect.name == "postgresql":
        op.drop_constraint(instead_of[0], "events")
        op.create_unique_constraint(new[0], "events", new[1])
        return
    # SQLite cannot drop a constraint.
    op.rename_table("events", "events_before")
    op.create_table(
        "events",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("event_id", sa.String(36), nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("occurred_at", sa.BigInteger, nullable=False),
        sa.Column("recorded_at", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("causation_id", sa.String(36)),
        sa.Column("payload", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("position", name="pk_events"),
        sa.UniqueConstraint("run_id", "version", name="uq_events_run_id_version"),
        sa.UniqueConstraint(*new[1], name=new[0]),
        sqlite_autoincrement=True,
    )
    op.execute(f"INSERT INTO events ({_COLUMNS}) SELECT {_COLUMNS} FROM events_before ORDER BY position")  # noqa: S608
    op.drop_table("events_before")
