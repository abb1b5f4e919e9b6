"""Write each run of the log as one MLflow run, across all its attempts.

The tag `sftd.cursor` of the MLflow run is the version of the stream up to which everything is written. It is sent in the same
request as the points that it covers. MLflow commits points before tags, so after a crash at most one request is sent
again. Its points are the same, byte for byte, because they and their times come from the log, and MLflow drops them.

Changes by users in MLflow: a renamed experiment stays in use, and an edited note is kept. A deleted run or experiment stays
deleted until the log has a new event for it; then it is restored with its points and its cursor. If it was deleted
permanently, it is written again from its first event.

A run that an older sftd copied in another form (other metric names, for example) is written again into the same MLflow run,
from its first event. Data that only the old form had is removed where possible (see `Tracking.clear`).
"""

from __future__ import annotations

import hashlib
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path

import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.run.fold import evolve
from sftd.domain.run.state import Run
from sftd.domain.spec.spec import Spec
from sftd.projections.mirrors.mlflow import mapping, reading
from sftd.projections.mirrors.mlflow.client import METRICS_PER_BATCH, Tracking
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log.event_store import read_stream


@dataclass
class _Mirrored:
    """A run in MLflow. `run` is the sftd run as of `cursor`, None until it is needed. `tags` are the tags in MLflow. `submitted`
    is the spec in its parameters."""

    uuid: str
    submitted: Spec
    cursor: int
    status: str
    end_time: int | None
    run: Run | None = None
    highest: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def position_name(tracking_uri: str, experiment_prefix: str = "") -> str:
    """Name of the mirror's position and lease for these experiments. It is a digest, because the URI may contain a password. The
    host name distinguishes local files with the same path. Each form has its own position, because a new form is copied
    from the first event."""
    if tracking_uri.startswith("sqlite:"):
        tracking_uri = f"{socket.gethostname()} {tracking_uri}"
    name = f"{tracking_uri} {experiment_prefix} {mapping.MAPPING}"
    return f"mlflow:{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class MlflowWriter:
    """Writes runs into the MLflow at `tracking_uri`. Not thread-safe.

    `artifacts_dir` is the folder of artifacts when `tracking_uri` is a database; a server has its own setting.
    `experiment_prefix` precedes each experiment's name. The writer looks for its runs only in these experiments: with another
    prefix, or another MLflow, it copies every run from the first event.
    """

    types = reading.MIRRORED

    def __init__(
        self,
        store: Store,
        tracking_uri: str,
        artifacts_dir: Path | None = None,
        *,
        experiment_prefix: str = "",
    ) -> None:
        self._store = store
        self._tracking = Tracking(tracking_uri, artifacts_dir)
        self._prefix = experiment_prefix
        # A cache of the runs in MLflow. Ended runs are dropped.
        self._runs: dict[str, _Mirrored] = {}

    def forget(self) -> None:
        """Clear the cache of runs in MLflow: a user may have deleted one."""
        self._runs.clear()

    def cursor(self, run_id: str, version: int) -> int:
        """The version up to which MLflow has a run. Creates or restores the MLflow run if there are events to add."""
        mirrored = self._mirrored(run_id, version)
        return version if mirrored is None else mirrored.cursor

    def send(self, run_id: str, page: Sequence[e.Recorded], upto: int, go_on: Callable[[], None]) -> None:
        """Write events in as few requests as possible."""
        mirrored = self._mirrored(run_id, upto)
        assert mirrored is not None, "its cursor is before these events"
        ahead = deque(page)
        self._send_request(run_id, mirrored, ahead, upto, go_on)
        while ahead:
            self._send_request(run_id, mirrored, ahead, upto, go_on)
        if mirrored.status in mapping.ENDED:
            del self._runs[run_id]

    def _mirrored(self, run_id: str, version: int) -> _Mirrored | None:
        found = self._runs.get(run_id) or self._find(run_id, version)
        if found is not None:
            self._runs[run_id] = found
        return found

    def _find(self, run_id: str, version: int) -> _Mirrored | None:
        """The run in MLflow, created or restored if there are events to add; None if there is nothing to do."""
        with self._store.read() as connection:
            submitted = next(read_stream(connection, run_id, types=(e.RunSubmitted.__name__,), limit=1), None)
            last = connection.execute(
                sa.select(sa.func.max(events.c.version)).where(events.c.run_id == run_id)
            ).scalar_one()
        if submitted is None or not isinstance(submitted.event, e.RunSubmitted):
            return None
        event = submitted.event
        experiment = self._tracking.experiment(mapping.experiment_names(event, self._prefix))
        remote = self._tracking.find_run(experiment.id, run_id)
        if remote is not None and remote.covered >= version and remote.deleted:
            return None
        if experiment.deleted:
            self._tracking.restore_experiment(experiment.id)
        elif remote is not None and remote.deleted:
            self._tracking.restore_run(remote.uuid)
        if remote is None:
            remote = self._tracking.create_run(
                experiment.id,
                mapping.run_name(run_id, event),
                mapping.millis(submitted.occurred_at),
                mapping.first_tags(run_id, event),
            )
        elif remote.cursor < remote.covered <= last:
            # If MLflow has more than the log, the log was restored from a backup: keep the data.
            self._tracking.clear(remote.uuid, *mapping.former(event.spec))
        spec = evolve(Run(run_id), submitted).spec
        return _Mirrored(remote.uuid, spec, remote.cursor, remote.status, remote.end_time, tags=remote.tags)

    def _send_request(
        self,
        run_id: str,
        mirrored: _Mirrored,
        ahead: deque[e.Recorded],
        upto: int,
        go_on: Callable[[], None],
    ) -> None:
        """Send the events of `ahead` that fit into one request. Inherited curves, which may take minutes, parameters, status and
        samples are sent in separate requests before it."""
        run = mirrored.run
        if run is None:
            with self._store.read() as connection:
                run, mirrored.highest = reading.recover(connection, run_id, mirrored.cursor)
        found: list[mapping.MetricPoint] = []
        own_tags: dict[str, str] = {}
        cursor, generated = upto, 0
        while ahead and (not found or len(found) + mapping.most_points(ahead[0].event) <= METRICS_PER_BATCH):
            recorded = ahead.popleft()
            cursor = recorded.version if ahead else upto
            run = evolve(run, recorded)
            found += mapping.points(recorded, mirrored.highest)
            own_tags |= mapping.event_tags(recorded.event)
            generated += isinstance(recorded.event, e.SampleGenerated)
            if recorded.type in reading.ENDS:
                own_tags |= mapping.time_tags(reading.ledger(self._store, recorded))
            elif isinstance(recorded.event, e.RunForked):
                for points in batched(
                    reading.inherited(self._store, recorded, recorded.event), METRICS_PER_BATCH
                ):
                    go_on()
                    self._tracking.log(mirrored.uuid, points, {})
            elif isinstance(recorded.event, e.RunSubmitted):
                submitted = recorded.event
                self._tracking.describe(
                    mirrored.uuid, mapping.params(submitted.spec), mapping.datasets(submitted)
                )
        # Before the cursor, which states that everything up to it is written.
        if generated:
            go_on()
            own_tags |= self._samples(run_id, mirrored.uuid, cursor)
        go_on()
        status, end_time = mapping.status(run)
        if status != mirrored.status or end_time not in (None, mirrored.end_time):
            self._tracking.set_status(mirrored.uuid, status, end_time)
        tags = mapping.tags(run, mirrored.submitted)
        there = mirrored.tags
        if stale := [key for key in there if mapping.is_taken_back(key) and key not in tags]:
            self._tracking.untag(mirrored.uuid, stale)
        changed = {key: value for key, value in tags.items() if there.get(key) != value}
        self._tracking.log(
            mirrored.uuid, found, {**changed, **own_tags, mapping.TAG_CURSOR: mapping.cursor_tag(cursor)}
        )
        mirrored.run, mirrored.cursor, mirrored.tags = run, cursor, tags
        mirrored.status, mirrored.end_time = status, end_time or mirrored.end_time

    def _samples(self, run_id: str, uuid: str, version: int) -> dict[str, str]:
        """Write the table of sample answers as of `version`. The artifact store may be separate and refuse it, for example for
        lack of credentials. Then a tag has the reason, and the metrics are still written."""
        with self._store.read() as connection:
            table = mapping.samples_table(reading.samples(connection, run_id, version))
        refused = self._tracking.log_table(uuid, mapping.SAMPLES_FILE, table)
        return mapping.samples_tag(refused)
