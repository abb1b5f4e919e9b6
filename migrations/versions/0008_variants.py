"""What sets a run apart from its siblings, as a view: the values of a sweep's point, the changes of a fork. And runs by name."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# In these words the index of the events that are not steps is used.
_FIRST = sa.text(
    "SELECT run_id, type, payload FROM events"
    " WHERE type <> 'StepCompleted' AND version <= 2 AND type IN ('SweepJoined', 'RunForked') ORDER BY run_id, version"
)


def upgrade() -> None:
    """A row for each member of a sweep and each fork that the log has."""
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
        # A script cannot read the log: `sftd views rebuild` fills the table.
        return
    rows = []
    for run_id, kind, text in op.get_bind().execute(_FIRST):
        payload = msgspec.json.decode(text)
        if kind == "SweepJoined":
            changed = payload["values"]
        else:
            changed = {key: after for key, (_, after) in payload["changes"].items()}
        # As the view writes it: a rebuild makes the same bytes.
        row = {"run_id": run_id, "changed": msgspec.json.encode(changed).decode()}
        rows.append(row | {"sweep": payload.get("sweep", "")})
    op.bulk_insert(variants, rows)


def downgrade() -> None:
    """As it was."""
    op.drop_index("ix_view_runs_name", "view_runs")
    op.drop_table("view_variants")
