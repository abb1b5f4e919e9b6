"""Add the scheduler's data of queued runs: the devices that they need, and the runs that they wait for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add two tables. The scheduler reads the log of a run that has no row in the first."""
    op.create_table(
        "queue_demands",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("demand", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_queue_demands"),
    )
    op.create_table(
        "queue_after",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("after", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "after", name="pk_queue_after"),
    )
    op.create_index("ix_queue_after_after", "queue_after", ["after"])


def downgrade() -> None:
    """Revert the change."""
    op.drop_table("queue_after")
    op.drop_table("queue_demands")
