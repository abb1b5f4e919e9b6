"""Every table. Times are whole microseconds since the Unix epoch (UTC).

`events` is the source of truth. `queue`, `daemons` and `claims` hold operational state: which daemon may do what now.
`journal_cursors` and `projection_positions` are reading positions. `view_*` can be deleted and rebuilt from events.
"""

from __future__ import annotations

import sqlalchemy as sa

# The Alembic revision that makes these tables. A test compares it with the head of migrations/.
SCHEMA_REVISION = "0009"

# Events that are not steps have their own index. The database uses it only for queries that contain this exact condition.
NO_STEP = sa.text("type <> 'StepCompleted'")

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite generates ids only for a column whose type is exactly INTEGER.
_Position = sa.BigInteger().with_variant(sa.Integer, "sqlite")

events = sa.Table(
    "events",
    metadata,
    sa.Column("position", _Position, primary_key=True, autoincrement=True),
    sa.Column("event_id", sa.String(36), nullable=False),
    sa.Column("run_id", sa.String(64), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("occurred_at", sa.BigInteger, nullable=False),
    sa.Column("recorded_at", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("causation_id", sa.String(36)),
    # JSON as text: PostgreSQL's jsonb would rewrite numbers (-0.0 becomes 0).
    sa.Column("payload", sa.Text, nullable=False),
    sa.UniqueConstraint("run_id", "version"),
    # Unique per run only: ids are random, and an index over all of them slows appends to a large log.
    sa.UniqueConstraint("run_id", "event_id"),
    # `schema` has the dialect-specific indexes.
)

queue = sa.Table(
    "queue",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("enqueued_at", sa.BigInteger, nullable=False),
    sa.Column("not_before", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer),
    sa.Column("token", sa.String(36)),
    sa.Column("owner", sa.String(64)),
    sa.Column("expires_at", sa.BigInteger),
    sa.Index("ix_queue_order", "state", sa.text("priority DESC"), "enqueued_at", "run_id"),
)

# The part of a run's spec that the scheduler needs, as JSON (`Demand`).
queue_demands = sa.Table(
    "queue_demands",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("demand", sa.Text, nullable=False),
)

# `run_id` does not start before `after` has succeeded.
queue_after = sa.Table(
    "queue_after",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("after", sa.String(64), primary_key=True),
    sa.Index("ix_queue_after_after", "after"),
)

daemons = sa.Table(
    "daemons",
    metadata,
    sa.Column("daemon_id", sa.String(64), primary_key=True),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("create_time", sa.Float(53), nullable=False),
    sa.Column("home", sa.Text, nullable=False),
    sa.Column("devices", sa.Text, nullable=False),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("seen_at", sa.BigInteger, nullable=False),
    sa.Column("stopped_at", sa.BigInteger),
    # See `domain.identity`; empty for a daemon of an older sftd.
    sa.Column("boot_id", sa.String(64), nullable=False, server_default=""),
    sa.Column("pid_namespace", sa.String(32), nullable=False, server_default=""),
    sa.Column("home_id", sa.String(64), nullable=False, server_default=""),
)

# Leases on tasks that one daemon at a time does, such as mirroring to MLflow (`store.queue.named_leases`).
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("token", sa.String(36), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
)

journal_cursors = sa.Table(
    "journal_cursors",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("line", sa.BigInteger, nullable=False),
    sa.Column("byte_offset", sa.BigInteger, nullable=False),
)

projection_positions = sa.Table(
    "projection_positions",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False),
)

view_runs = sa.Table(
    "view_runs",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("project", sa.String(200), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("user", sa.String(200), nullable=False),
    sa.Column("submitted_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("planned_steps", sa.BigInteger, nullable=False),
    # Text, because a loss may be NaN and must read back bit for bit.
    sa.Column("loss", sa.String(32)),
    sa.Column("val_loss", sa.String(32)),
    sa.Column("seconds_per_step", sa.Float(53)),
    sa.Column("anomalies", sa.Integer, nullable=False),
    sa.Column("message", sa.Text),
    # The folded Run as JSON, so that a decision need not read the whole stream again.
    sa.Column("state", sa.Text, nullable=False),
    sa.Index("ix_view_runs_submitted_at", "submitted_at"),
    sa.Index("ix_view_runs_name", "name"),
)

# How a run differs from its siblings: `changed` is a JSON object, key → value. A member of a sweep has the values of its
# point. A fork has the values that differ from its parent, and an empty `sweep`. Other runs have no row.
view_variants = sa.Table(
    "view_variants",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("sweep", sa.String(64), nullable=False),
    sa.Column("changed", sa.Text, nullable=False),
    sa.Index("ix_view_variants_sweep", "sweep"),
)

view_checkpoints = sa.Table(
    "view_checkpoints",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("manifest_digest", sa.String(64), nullable=False),
    sa.Column("val_loss", sa.String(32)),
    sa.Column("published_at", sa.BigInteger, nullable=False),
    sa.Column("superseded", sa.Boolean(create_constraint=False), nullable=False),
    sa.Column("kept_because", sa.Text, nullable=False),
)

# The size of a run's own checkpoints according to the log, and when its files were removed. A run without a row has none.
view_files = sa.Table(
    "view_files",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("removed_at", sa.BigInteger),
)

# The evaluations of each run's checkpoints. `metrics` is a JSON object, name → value.
view_evaluations = sa.Table(
    "view_evaluations",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("since", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Index("ix_view_evaluations_status", "status"),
)

# Where each run's time went up to `version`, as JSON (`goodput.Fold`). A run without a row is folded from its log.
view_goodput = sa.Table(
    "view_goodput",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("fold", sa.Text, nullable=False),
)
