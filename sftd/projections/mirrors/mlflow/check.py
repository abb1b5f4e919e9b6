"""Compare MLflow with the log: every point, status, times, parameters, datasets and tags."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.run.fold import evolve
from sftd.domain.text.words import counted
from sftd.projections.mirrors.feed import Feed
from sftd.projections.mirrors.mlflow import mapping, reading
from sftd.projections.mirrors.mlflow.client import RemoteRun, Tracking
from sftd.projections.mirrors.mlflow.writer import MlflowWriter, position_name
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log.event_store import read_stream

_TRIES = 5
_MISSING = "MLflow has no such run"
_FORMER = "an older sftd wrote it: a running daemon, or `sftd mlflow rebuild --prefix ''`, writes it again"
# (step, timestamp, value), the value as text so that NaN equals itself.
_Row = tuple[int, int, str]


class MirrorComparison(msgspec.Struct, frozen=True):
    """The result of comparing a run: the number of points in the log, the number of events that MLflow does not have yet
    (`behind`), and the differences in the mirrored part."""

    run_id: str
    experiment: str
    points: int
    behind: int
    differences: list[str]

    @property
    def is_equal(self) -> bool:
        """Whether MLflow matches the log."""
        return not self.behind and not self.differences


def versions(store: Store, run_ids: Iterable[str] = ()) -> dict[str, int]:
    """Run id → last version of these runs, or of all, in the order in which they began."""
    c = events.c
    query = sa.select(c.run_id, sa.func.max(c.version)).group_by(c.run_id).order_by(sa.func.min(c.position))
    if wanted := list(run_ids):
        query = query.where(c.run_id.in_(wanted))
    with store.read() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


def rebuild(
    store: Store, tracking_uri: str, artifacts_dir: Path | None, prefix: str, run_ids: Iterable[str]
) -> Iterator[MirrorComparison]:
    """Mirror runs from the log into the experiments with `prefix`, and compare each with the log.

    It may be interrupted at any time. The next call continues and writes nothing twice.
    """
    writer = MlflowWriter(store, tracking_uri, artifacts_dir, experiment_prefix=prefix)
    feed = Feed(store, writer, position_name(tracking_uri, prefix))
    for run_id, version in versions(store, run_ids).items():
        feed.copy_run(run_id, version, lambda: False)
        yield compare_run(store, Tracking(tracking_uri, artifacts_dir), prefix, run_id, version)


def compare_run(store: Store, tracking: Tracking, prefix: str, run_id: str, version: int) -> MirrorComparison:
    """Compare a run in MLflow with the log. MLflow should have it at least up to `version`. Writes nothing."""
    recorded, event = _submission(store, run_id)
    names = mapping.experiment_names(event, prefix)
    if (experiment := tracking.find_experiment(names)) is None:
        return MirrorComparison(run_id, names[-1], 0, version, [_MISSING])
    for _ in range(_TRIES):
        if (there := tracking.find_run(experiment.id, run_id)) is None:
            return MirrorComparison(run_id, experiment.name, 0, version, [_MISSING])
        if there.cursor < there.covered:
            return MirrorComparison(run_id, experiment.name, 0, version - there.cursor, [_FORMER])
        wrong = ["it is deleted in MLflow"] if there.deleted else []
        wrong += _facts(store, tracking, there, recorded, event)
        points, differences = _points(store, tracking, there, run_id)
        found = MirrorComparison(
            run_id, experiment.name, points, max(0, version - there.cursor), wrong + differences
        )
        # A daemon may have mirrored more of the run between two requests: then compare again.
        if (
            found.is_equal
            or (now := tracking.find_run(experiment.id, run_id)) is None
            or now.cursor == there.cursor
        ):
            break
    return found


def _points(store: Store, tracking: Tracking, there: RemoteRun, run_id: str) -> tuple[int, list[str]]:
    """The number of points in the log up to the cursor, and the differences in MLflow."""
    expected: dict[str, list[_Row]] = {}
    for point in reading.history(store, run_id, there.cursor):
        key = sys.intern(point.key)
        expected.setdefault(key, []).append((point.step, point.timestamp, _text(point.value)))
    wrong: list[str] = []
    for key, rows in expected.items():
        found = sorted((p.step, p.timestamp, _text(p.value)) for p in tracking.points(there.uuid, key))
        wrong += _differences(key, sorted(rows), found)
    return sum(map(len, expected.values())), wrong


class Place(NamedTuple):
    """A run's place in MLflow: the id of its experiment, and the MLflow run if it exists."""

    experiment: str
    run: RemoteRun | None


def place(store: Store, tracking: Tracking, run_id: str) -> Place | None:
    """A run's place in MLflow; None if MLflow does not have its experiment."""
    _, event = _submission(store, run_id)
    experiment = tracking.find_experiment(mapping.experiment_names(event))
    return Place(experiment.id, tracking.find_run(experiment.id, run_id)) if experiment is not None else None


def _submission(store: Store, run_id: str) -> tuple[e.Recorded, e.RunSubmitted]:
    with store.read() as connection:
        recorded = next(read_stream(connection, run_id, types=(e.RunSubmitted.__name__,), limit=1))
    assert isinstance(recorded.event, e.RunSubmitted)
    return recorded, recorded.event


def _text(value: float) -> str:
    # MLflow cannot store infinity; it stores the largest float.
    return repr(math.copysign(sys.float_info.max, value) if math.isinf(value) else value)


def _differences(key: str, log: list[_Row], there: list[_Row]) -> Iterator[str]:
    if log == there:
        return
    lacking, extra = sorted(set(log) - set(there)), sorted(set(there) - set(log))
    twice = len(there) - len(set(there))
    if lacking:
        yield f"{key}: {counted(len(lacking), 'point')} of the log not in MLflow, the first at step {lacking[0][0]}"
    if extra:
        yield f"{key}: {counted(len(extra), 'point')} in MLflow not in the log, the first at step {extra[0][0]}"
    if twice:
        yield f"{key}: {counted(twice, 'point')} in MLflow twice"


def _facts(
    store: Store, tracking: Tracking, remote: RemoteRun, recorded: e.Recorded, submitted: e.RunSubmitted
) -> Iterator[str]:
    with store.read() as connection:
        run, _ = reading.recover(connection, recorded.run_id, remote.cursor)
        end = reading.last_end(connection, recorded.run_id, remote.cursor)
    there = tracking.described(remote.uuid)
    status, end_time = mapping.status(run)
    start = mapping.millis(recorded.occurred_at)
    if there.start_time != start:
        yield f"start: MLflow has {there.start_time}, the log {start}"
    if there.status != status:
        yield f"status: MLflow has {there.status}, the log {status}"
    if end_time is not None and there.end_time != end_time:
        yield f"end: MLflow has {there.end_time}, the log {end_time}"
    params = mapping.params(submitted.spec)
    if wrong := sorted(key for key in params if there.params.get(key) != params[key]):
        yield f"parameters: {', '.join(wrong)}"
    datasets = {(d.name, d.digest) for d in mapping.datasets(submitted)}
    if not datasets <= there.datasets:
        yield "datasets: some are missing"
    tags = mapping.tags(run, evolve(run, recorded).spec)
    if end is not None:
        tags |= mapping.time_tags(reading.ledger(store, end))
    kept = {key for key in there.tags if key in tags or mapping.is_taken_back(key)}
    if wrong := sorted(key for key in kept | tags.keys() if there.tags.get(key) != tags.get(key)):
        yield f"tags: {', '.join(wrong)}"
