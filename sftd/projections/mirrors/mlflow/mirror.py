"""The MLflow mirror: every run of the log as one MLflow run, across all its attempts.

How far a run is mirrored stands in MLflow, in the tag `sftd.cursor`: the version of its stream up to which all has
been written. It travels in the same request as the points that it covers. MLflow commits points before tags, so after
a crash at most one request is sent again; its points are byte for byte the same, because they come from the log with
the log's times, and MLflow drops them. The position in our database only says where to look for new events: without
it, the mirror reads everything once and writes nothing.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.run.fold import evolve
from sftd.domain.run.state import Run
from sftd.domain.spec.spec import Spec
from sftd.projections.mirrors.mlflow import mapping, reading
from sftd.projections.mirrors.mlflow.client import METRICS_PER_BATCH, MirrorUnavailable, Tracking
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log.event_store import read_stream
from sftd.store.log.positions import projection_position, set_projection_position

__all__ = ["MirrorUnavailable", "MlflowMirror", "position_name"]


# Rows of the log that are looked at before the position moves.
_WINDOW = 5000


class _Interrupted(Exception):
    """The mirror was told to stop between two requests that belong together."""


class _Window(NamedTuple):
    """The next rows of the log: how many, up to which position, and the last version of each run among them."""

    rows: int
    position: int
    versions: dict[str, int]


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
    # Events that are read and not yet sent.
    ahead: deque[e.Recorded] = field(default_factory=deque)
    highest: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def position_name(tracking_uri: str, experiment_prefix: str = "") -> str:
    """Name of the position of the mirror into these experiments, and of the claim on mirroring there. The URI may hold a
    password, so its digest stands in. A file of one host is not that of another, though both have the same name. Another
    form is copied from the first event on, so it has a position of its own."""
    if tracking_uri.startswith("sqlite:"):
        tracking_uri = f"{socket.gethostname()} {tracking_uri}"
    name = f"{tracking_uri} {experiment_prefix} {mapping.MAPPING}"
    return f"mlflow:{hashlib.sha256(name.encode()).hexdigest()[:16]}"


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
                    self._put_back()
                    return taken
            with self._store.write(appends=False) as tx:
                set_projection_position(tx.connection, self._position_name, window.position)
            self._position = window.position
            taken += window.rows
        return taken

    def forget(self) -> None:
        """Another mirror has written meanwhile: ask MLflow again how far each run is."""
        self._runs.clear()

    def mirror_run(self, run_id: str, version: int, should_stop: Callable[[], bool]) -> bool:
        """Mirror one run at least up to `version`, wherever the position is. False when it was told to stop before."""
        return self._mirror(run_id, version, should_stop)

    def _put_back(self) -> None:
        """If another has mirrored while a request of ours was held up (a host that slept, say), that request came after
        its own, with an older cursor and status: have it ask MLflow again from where we were."""
        with self._store.write(appends=False) as tx:
            if self._position not in (None, projection_position(tx.connection, self._position_name)):
                set_projection_position(tx.connection, self._position_name, self._position or 0)

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
                self._send_page(run_id, mirrored, version, should_stop)
        except _Interrupted:
            # What was sent is there, and no cursor says so: who goes on sends it again, byte for byte.
            self._runs.pop(run_id, None)
            return False
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

    def _send_page(
        self, run_id: str, mirrored: _Mirrored, version: int, should_stop: Callable[[], bool]
    ) -> None:
        """Send the events behind the cursor that fit into one request, and what goes with them in requests of its own: an
        inherited curve may take minutes. Raises `_Interrupted`."""

        def go_on() -> None:
            # Asking also keeps the right to mirror, which expires (`daemon/mirror_turn.py`).
            if should_stop():
                raise _Interrupted

        run = mirrored.run
        with self._store.read() as connection:
            if run is None:
                run, mirrored.highest = reading.recover(connection, run_id, mirrored.cursor)
            if not mirrored.ahead:
                page = read_stream(connection, run_id, mirrored.cursor, reading.MIRRORED, reading.PAGE)
                mirrored.ahead.extend(page)
        found: list[mapping.Point] = []
        own_tags: dict[str, str] = {}
        # Only events that are not mirrored may be left.
        cursor, generated = version, 0
        while (
            mirrored.ahead and len(found) + mapping.most_points(mirrored.ahead[0].event) <= METRICS_PER_BATCH
        ):
            recorded = mirrored.ahead.popleft()
            cursor = recorded.version
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
        for want of credentials, say: that is told in a tag, and keeps no metric waiting."""
        with self._store.read() as connection:
            table = mapping.samples_table(reading.samples(connection, run_id, version))
        refused = self._tracking.log_table(uuid, mapping.SAMPLES_FILE, table)
        return mapping.samples_tag(refused)
