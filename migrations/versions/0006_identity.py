"""Add the identity of each daemon beyond its host name: boot, pid namespace and home."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_COLUMNS = (("boot_id", 64), ("pid_namespace", 32), ("home_id", 64))


def upgrade() -> None:
    """Add the columns, which are empty for older daemons."""
    with op.batch_alter_table("daemons") as table:
        for name, length in _COLUMNS:
            table.add_column(sa.Column(name, sa.String(length), nullable=False, server_default=""))


def downgrade() -> None:
    """Revert the change."""
    with op.batch_alter_table("daemons") as table:
        for name, _ in reversed(_COLUMNS):
            table.drop_column(name)
