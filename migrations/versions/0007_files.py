"""What each run's checkpoints take on the disk, and which runs were removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Filled from the view of checkpoints: those that a fork has from its parent are the parent's."""
    op.create_table(
        "view_files",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("removed_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("run_id", name="pk_view_files"),
    )
    op.execute(
        "INSERT INTO view_files (run_id, bytes) SELECT run_id, SUM(bytes) FROM view_checkpoints"
        " WHERE kept_because NOT LIKE '%not this run''s to delete%' GROUP BY run_id"
    )


def downgrade() -> None:
    """As it was."""
    op.drop_table("view_files")
