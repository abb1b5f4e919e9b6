"""The MLflow mirror: every run of the log as one MLflow run, across all its attempts.

How far a run is mirrored stands in MLflow, in the tag `sftd.cursor`: the version of its stream up to which all has
been written. It travels in the same request as the points that it covers. MLflow commits points before tags, so after
a crash at most one request is sent again; its points are byte for byte the same, because they come from the log with
the log's times, and MLflow drops them. The position in our database only says where to look for new events: without
it, the mirror reads everything once and writes nothing.

What people do in MLflow: a renamed experiment stays in use, an edited note stays as it is. A deleted run (or
experiment) is left alone until the log has something new to say about it; then it is restored, for its points and its
cursor are still there. One that is gone for good is written again from its first event.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from sftd.domain import events as e
from sftd.domain.evolve import evolve, fold
from sftd.domain.run import Run
from sftd.projections import mlflow_mapping as mapping
from sftd.projections.mlflow_client import METRICS_PER_BATCH, MirrorUnavailable, Tracking
from sftd.store.engine import Store
from sftd.store.event_store import read_stream
from sftd.store.goodput import read_ledger
from sftd.store.positions import projection_position, set_projection_position
from sftd.store.tables import events

__all__ = ["MirrorUnavailable", "MlflowMirror", "position_name"]


# Rows of the log that are looked at before the position moves.
_WINDOW = 5000
# Events in one request to MLflow.
_PAGE = METRICS_PER_BATCH // mapping.POINTS_PER_EVENT

_STEPS = (e.StepCompleted.__name__, e.ValidationCompleted.__name__)
_LIFECYCLE = tuple(
    cls.__name__
    for cls in (
        e.RunForked,
        e.RunSubmitted,
        e.SweepJoined,
        e.RunHeld,
        e.RunReleased,
        e.AttemptClaimed,
        e.TrainingResumed,
        e.CheckpointPublished,
        e.CheckpointRejected,
        e.CheckpointDeleted,
        e.StopRequested,
        e.ResumeRequested,
        e.AttemptFailed,
        e.AttemptLost,
        e.AttemptPaused,
        e.AttemptPreempted,
        e.RunSucceeded,
        e.RunFailed,
        e.RunCancelled,
    )
)
_ENDS = (e.RunSucceeded.__name__, e.RunFailed.__name__, e.RunCancelled.__name__)
# Types that are not named here are not even decoded: a newer sftd may have written them.
_MIRRORED = _LIFECYCLE + _STEPS


class _Window(NamedTuple):
    """The next rows of the log: how many, up to which position, and the last version of each run among them."""

    rows: int
    position: int
    versions: dict[str, int]


@dataclass
class _Mirrored:
    """A run in MLflow. `run` is our run as of `cursor`, None until it is needed; `tags` are those known to be there."""

    uuid: str
    cursor: int
    status: str
    end_time: int | None
    run: Run | None = None
    highest: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def position_name(tracking_uri: str, experiment_prefix: str = "") -> str:
    """Name of the position of the mirror into these experiments. The URI may hold a password, so its digest stands in."""
    return f"mlflow:{hashlib.sha256(f'{tracking_uri} {experiment_prefix}'.encode()).hexdigest()[:16]}"


class MlflowMirror:
    """Mirrors the log into the MLflow at `tracking_uri`. Not for several threads.

    `artifacts_dir` is where artifacts go when `tracking_uri` is a database; a server decides that itself.
    `experiment_prefix` comes before each experiment's name, and a mirror looks for its runs only there: with another
    prefix, or another MLflow, it fills a second set of experiments from the first event on.
    """

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
        self._position_name = position_name(tracking_uri, experiment_prefix)
        # Only what spares asking MLflow again; forgotten at the first trouble. Ended runs are dropped.
        self._runs: dict[str, _Mirrored] = {}
        self._position: int | None = None

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Mirror what is new in the log; returns the number of its events that are now in MLflow.

        Stops early, between two requests, when `should_stop` says so. Raises `MirrorUnavailable` when MLflow
        does not answer or refuses; the next call goes on exactly there.
        """
        taken = 0
        while not should_stop():
            window = self._next_window()
            if not window.rows:
                break
            for run_id, version in window.versions.items():
                if not self._mirror(run_id, version, should_stop):
                    return taken
            with self._store.write(appends=False) as tx:
                set_projection_position(tx.connection, self._position_name, window.position)
            self._position = window.position
            taken += window.rows
        return taken

    def _next_window(self) -> _Window:
        with self._store.read() as connection:
            position = projection_position(connection, self._position_name)
            query = (
                sa.select(events.c.position, events.c.run_id, events.c.version)
                .where(events.c.position > position)
                .order_by(events.c.position)
                .limit(_WINDOW)
            )
            rows = connection.execute(query).all()
        if position != self._position:
            # Another daemon mirrors too: its cursors are ahead of those remembered. Sending twice does no harm, but
            # MLflow takes seconds to find a batch that it has already in a long history.
            self._runs.clear()
            self._position = position
        return _Window(
            len(rows), rows[-1].position if rows else position, {row.run_id: row.version for row in rows}
        )

    def _mirror(self, run_id: str, version: int, should_stop: Callable[[], bool]) -> bool:
        """Mirror a run at least up to `version`. False when it was told to stop before."""
        try:
            mirrored = self._runs.get(run_id) or self._find(run_id, version)
            if mirrored is None:
                return True
            while mirrored.cursor < version:
                if should_stop():
                    return False
                self._send_page(run_id, mirrored, version)
        except BaseException:
            # What was being sent may have arrived or not, or a person has deleted it: only MLflow knows.
            self._runs.clear()
            raise
        self._runs[run_id] = mirrored
        if mirrored.status in mapping.ENDED and mirrored.cursor == version:
            del self._runs[run_id]
        return True

    def _find(self, run_id: str, version: int) -> _Mirrored | None:
        """The run in MLflow, created or restored if there is anything to add; None if there is nothing to do."""
        with self._store.read() as connection:
            submitted = next(read_stream(connection, run_id, types=(e.RunSubmitted.__name__,), limit=1), None)
        if submitted is None or not isinstance(submitted.event, e.RunSubmitted):
            return None
        event = submitted.event
        experiment = self._tracking.experiment(self._prefix + mapping.experiment_name(event))
        remote = self._tracking.find_run(experiment.id, run_id)
        if remote is not None and remote.cursor >= version and remote.deleted:
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
        return _Mirrored(remote.uuid, remote.cursor, remote.status, remote.end_time)

    def _send_page(self, run_id: str, mirrored: _Mirrored, version: int) -> None:
        """Send the events behind the cursor that fit into one request."""
        with self._store.read() as connection:
            run = mirrored.run
            if run is None:
                run, mirrored.highest = _recover(connection, run_id, mirrored.cursor)
            page = list(read_stream(connection, run_id, mirrored.cursor, _MIRRORED, _PAGE))
            # As of each end, not of now: what is sent again after a crash is byte for byte the same.
            ledgers = {
                r.version: read_ledger(connection, run_id, r.occurred_at, r.version)
                for r in page
                if r.type in _ENDS
            }
        found: list[mapping.Point] = []
        for recorded in page:
            if isinstance(recorded.event, e.RunForked):
                for inherited in self._inherited(recorded, recorded.event):
                    self._tracking.log(mirrored.uuid, inherited, {})
            elif isinstance(recorded.event, e.RunSubmitted):
                self._tracking.describe(
                    mirrored.uuid, mapping.params(recorded.event.spec), mapping.datasets(recorded.event)
                )
            run = evolve(run, recorded)
            found += mapping.points(recorded, mirrored.highest)
            if recorded.version in ledgers:
                found += mapping.goodput_points(ledgers[recorded.version], run.step)
        # Before the cursor, which says that all up to there is done.
        status, end_time = mapping.status(run)
        if status != mirrored.status or end_time not in (None, mirrored.end_time):
            self._tracking.set_status(mirrored.uuid, status, end_time)
        # No page: only events that are not mirrored are left.
        cursor = page[-1].version if page else version
        tags = mapping.tags(run)
        changed = {key: value for key, value in tags.items() if mirrored.tags.get(key) != value}
        self._tracking.log(mirrored.uuid, found, {**changed, mapping.TAG_CURSOR: str(cursor)})
        mirrored.run, mirrored.cursor, mirrored.tags = run, cursor, tags
        mirrored.status, mirrored.end_time = status, end_time or mirrored.end_time

    def _inherited(self, recorded: e.Recorded, forked: e.RunForked) -> Iterator[list[mapping.Point]]:
        """The parent's curve, and its ancestors', up to the fork: the points of their own MLflow runs, a request at a time.

        As the log had them when the fork was made, so that they are the same whenever they are sent.
        """
        highest: dict[str, int] = {}
        version = 0
        while True:
            with self._store.read() as connection:
                page = list(
                    read_stream(connection, forked.parent, version, (e.RunForked.__name__, *_STEPS), _PAGE)
                )
            found: list[mapping.Point] = []
            for r in page:
                if isinstance(r.event, e.RunForked):
                    yield from self._inherited(r, r.event)
                elif r.position < recorded.position:
                    found += mapping.inherited(r, highest, forked.step)
            if found:
                yield found
            if len(page) < _PAGE:
                return
            version = page[-1].version


def _recover(connection: sa.Connection, run_id: str, cursor: int) -> tuple[Run, dict[str, int]]:
    """The run as of `cursor` and its highest step by event type, without reading all of its steps.

    Steps only grow within an attempt, so the last of each attempt holds the attempt's highest, and says as well as
    all of them do whether the run was running.
    """
    if cursor == 0:
        return Run(run_id), {}
    lifecycle = read_stream(connection, run_id, types=_LIFECYCLE)
    recorded = list(takewhile(lambda r: r.version <= cursor, lifecycle))
    last = (
        sa.select(sa.func.max(events.c.version))
        .where(events.c.run_id == run_id, events.c.version <= cursor, events.c.type.in_(_STEPS))
        .group_by(events.c.type, events.c.attempt)
    )
    for version in connection.execute(last).scalars().all():
        recorded += read_stream(connection, run_id, version - 1, limit=1)
    recorded.sort(key=lambda r: r.version)
    highest: dict[str, int] = {}
    for r in recorded:
        mapping.points(r, highest)
    return fold(Run(run_id), recorded), highest
