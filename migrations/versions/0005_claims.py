"""Add leases on tasks that one daemon at a time does, such as mirroring to MLflow."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table of leases."""
    op.create_table(
        "claims",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("token", sa.String(36), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_claims"),
    )


def downgrade() -> None:
    """Revert the change."""
    op.drop_table("claims")
