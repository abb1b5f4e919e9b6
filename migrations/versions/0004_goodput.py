"""The goodput of runs as a view, so that `sftd show` of a run of a million steps need not read them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Empty: a run gets its row with its next event, and is folded from its log until then."""
    op.create_table(
        "view_goodput",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("fold", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_view_goodput"),
    )


def downgrade() -> None:
    """As it was."""
    op.drop_table("view_goodput")
