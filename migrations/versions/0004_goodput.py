"""Add a view of the goodput of runs, so that `sftd show` need not read a million steps."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add an empty table. A run gets its row with its next event; until then it is folded from its log."""
    op.create_table(
        "view_goodput",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("fold", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_view_goodput"),
    )


def downgrade() -> None:
    """Revert the change."""
    op.drop_table("view_goodput")
