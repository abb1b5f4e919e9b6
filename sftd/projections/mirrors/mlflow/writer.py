"""Writes every run of the log as one MLflow run, across all its attempts.

The tag `sftd.cursor` of the MLflow run says how far it is mirrored: the version of its stream up to which all has been
written. It travels in the same request as the points that it covers. MLflow commits points before tags, so after
a crash at most one request is sent again; its points are byte for byte the same, because they come from the log with
the log's times, and MLflow drops them.

What people do in MLflow: a renamed experiment stays in use, an edited note stays as it is. A deleted run (or
experiment) is left alone until the log has something new to say about it; then it is restored, for its points and its
cursor are still there. One that is gone for good is written again from its first event.

A run that an older sftd copied in another form (other names of metrics, say) is written again into the same MLflow run, from
its first event; what only the old form had is removed where that can be done (see `Tracking.clear`).
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
    """A run in MLflow. `run` is our run as of `cursor`, None until it is needed; `tags` are those that are there; `submitted`
    is the spec that its parameters show."""

    uuid: str
    submitted: Spec
    cursor: int
    status: str
    end_time: int | None
    run: Run | None = None
    highest: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def position_name(tracking_uri: str, experiment_prefix: str = "") -> str:
    """Name of the position of the mirror into these experiments, and of the lease on mirroring there. The URI may hold a
    password, so its digest is used. A file of one host is not that of another, though both have the same name. Another
    form is copied from the first event on, so it has a position of its own."""
    if tracking_uri.startswith("sqlite:"):
        tracking_uri = f"{socket.gethostname()} {tracking_uri}"
    name = f"{tracking_uri} {experiment_prefix} {mapping.MAPPING}"
    return f"mlflow:{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class MlflowWriter:
    """Writes runs into the MLflow at `tracking_uri`. Not for several threads.

    `artifacts_dir` is where artifacts go when `tracking_uri` is a database; a server decides that itself.
    `experiment_prefix` comes before each experiment's name, and the writer looks for its runs only there: with another
    prefix, or another MLflow, it fills a second set of experiments from the first event on.
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
        # Only what spares asking MLflow again. Ended runs are dropped.
        self._runs: dict[str, _Mirrored] = {}

    def forget(self) -> None:
        """Ask MLflow again how far each run is: a person may have deleted one."""
        self._runs.clear()

    def cursor(self, run_id: str, version: int) -> int:
        """The version up to which MLflow has a run, which is created or restored if there is anything to add."""
        mirrored = self._mirrored(run_id, version)
        return version if mirrored is None else mirrored.cursor

    def send(self, run_id: str, page: Sequence[e.Recorded], upto: int, go_on: Callable[[], None]) -> None:
        """Write events, as many in a request as it holds."""
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
        """The run in MLflow, created or restored if there is anything to add; None if there is nothing to do."""
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
            # Not where MLflow knows of more than the log does: a log that was restored from a backup.
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
        """Send the events of `ahead` that fit into one request, and what goes with them in requests of its own: an inherited
        curve may take minutes."""
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
        # Before the cursor, which says that all up to there is done.
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
        """Write the table of sample answers as of `version`. Artifacts may lie in a store of their own that takes nothing,
        for want of credentials, say: a tag says so, and no metric waits."""
        with self._store.read() as connection:
            table = mapping.samples_table(reading.samples(connection, run_id, version))
        refused = self._tracking.log_table(uuid, mapping.SAMPLES_FILE, table)
        return mapping.samples_tag(refused)
