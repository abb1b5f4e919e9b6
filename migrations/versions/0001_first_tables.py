"""The first tables: log, queue, daemons, positions, views."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite generates ids only for a column whose type is exactly INTEGER.
_POSITION = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
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
        sa.UniqueConstraint("event_id", name="uq_events_event_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "queue",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("enqueued_at", sa.BigInteger, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer),
        sa.Column("token", sa.String(36)),
        sa.Column("owner", sa.String(64)),
        sa.Column("expires_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("run_id", name="pk_queue"),
    )
    op.create_index("ix_queue_order", "queue", ["state", sa.text("priority DESC"), "enqueued_at", "run_id"])
    op.create_table(
        "daemons",
        sa.Column("daemon_id", sa.String(64), nullable=False),
        sa.Column("host", sa.String(200), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("create_time", sa.Float(53), nullable=False),
        sa.Column("home", sa.Text, nullable=False),
        sa.Column("devices", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.Column("stopped_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("daemon_id", name="pk_daemons"),
    )
    op.create_table(
        "journal_cursors",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("line", sa.BigInteger, nullable=False),
        sa.Column("byte_offset", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "attempt", name="pk_journal_cursors"),
    )
    op.create_table(
        "projection_positions",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_projection_positions"),
    )
    op.create_table(
        "view_runs",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("project", sa.String(200), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("user", sa.String(200), nullable=False),
        sa.Column("submitted_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("planned_steps", sa.BigInteger, nullable=False),
        sa.Column("loss", sa.String(32)),
        sa.Column("val_loss", sa.String(32)),
        sa.Column("seconds_per_step", sa.Float(53)),
        sa.Column("anomalies", sa.Integer, nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_view_runs"),
    )
    op.create_index("ix_view_runs_submitted_at", "view_runs", ["submitted_at"])
    op.create_table(
        "view_checkpoints",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("manifest_digest", sa.String(64), nullable=False),
        sa.Column("val_loss", sa.String(32)),
        sa.Column("published_at", sa.BigInteger, nullable=False),
        sa.Column("superseded", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("kept_because", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "step", name="pk_view_checkpoints"),
    )


def downgrade() -> None:
    """Drop the tables with all their data."""
    for table in (
        "view_checkpoints",
        "view_runs",
        "projection_positions",
        "journal_cursors",
        "daemons",
        "queue",
        "events",
    ):
        op.drop_table(table)
