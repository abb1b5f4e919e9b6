"""Add the size of each run's checkpoints on disk, and the time when a run's files were removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Fill the table from the view of checkpoints, without checkpoints that belong to a fork's parent."""
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
    """Revert the change."""
    op.drop_table("view_files")
