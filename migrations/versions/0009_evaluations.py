"""Add a view of the evaluations of checkpoints. Logs of older versions have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "view_evaluations",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name", "step", name="pk_view_evaluations"),
    )
    op.create_index("ix_view_evaluations_status", "view_evaluations", ["status"])


def downgrade() -> None:
    """Revert the change."""
    op.drop_table("view_evaluations")
