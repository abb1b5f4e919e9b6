"""What the scheduler needs to know of runs in the queue: how many devices they want, and which runs they wait for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Two tables beside the queue; a run without a row in the first is looked up in its log."""
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
    """As it was."""
    op.drop_table("queue_after")
    op.drop_table("queue_demands")
