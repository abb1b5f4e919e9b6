"""Add a view of how a run differs from its siblings (values of a sweep's point, changes of a fork), and an index of run names."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The database uses the index of events that are not steps only for this exact condition.
_FIRST = sa.text(
    "SELECT run_id, type, payload FROM events"
    " WHERE type <> 'StepCompleted' AND version <= 2 AND type IN ('SweepJoined', 'RunForked') ORDER BY run_id, version"
)


def upgrade() -> None:
    """Add and fill the table: a row for each member of a sweep and each fork in the log."""
    variants = op.create_table(
        "view_variants",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("sweep", sa.String(64), nullable=False),
        sa.Column("changed", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_view_variants"),
    )
    op.create_index("ix_view_variants_sweep", "view_variants", ["sweep"])
    op.create_index("ix_view_runs_name", "view_runs", ["name"])
    if op.get_context().as_sql:
        # An offline SQL script cannot read the log. `sftd views rebuild` fills the table later.
        return
    rows = []
    for run_id, kind, text in op.get_bind().execute(_FIRST):
        payload = msgspec.json.decode(text)
        if kind == "SweepJoined":
            changed = payload["values"]
        else:
            changed = {key: after for key, (_, after) in payload["changes"].items()}
        # The same bytes as a rebuild of the view.
        row = {"run_id": run_id, "changed": msgspec.json.encode(changed).decode()}
        rows.append(row | {"sweep": payload.get("sweep", "")})
    op.bulk_insert(variants, rows)


def downgrade() -> None:
    """Revert the change."""
    op.drop_index("ix_view_runs_name", "view_runs")
    op.drop_table("view_variants")
