"""The client of the MLflow server or store. Every call to MLflow is here.

The first call imports mlflow, which is slow: the control plane starts without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from sftd.domain.text.credentials import without_credentials
from sftd.projections.mirrors.mlflow.mapping import (
    TAG_CURSOR,
    TAG_RUN,
    DatasetFacts,
    MetricPoint,
    parse_cursor,
)
from sftd.projections.mirrors.seam import MirrorUnavailable

# MLflow's limits per call are 1000 metrics, 100 params and 1000 entries in total; 40 are left for tags.
METRICS_PER_BATCH = 960
_PARAMS_PER_BATCH = 100

# Marks an experiment of the mirror, so that the mirror finds it after a user has renamed it.
_TAG_EXPERIMENT = "sftd.experiment"

# MLflow's own tag: the artifacts that its pages show as tables.
_TAG_ARTIFACTS = "mlflow.loggedArtifacts"

NO_PHONE_HOME = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
_QUIET_DEFAULTS = {
    # Otherwise creating the tables logs every migration, and each ended run prints a link.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # With its own retries, an MLflow call may block for four minutes and cannot be interrupted. The caller retries instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class RemoteRun(NamedTuple):
    """An MLflow run that mirrors an sftd run up to version `cursor` of its stream. `covered` is higher if an older sftd copied
    the run in another form: the version that was copied in any form."""

    uuid: str
    cursor: int
    covered: int
    status: str
    end_time: int | None
    deleted: bool
    tags: dict[str, str]


class Described(NamedTuple):
    """A run's data in MLflow, without its points. Datasets are (name, digest)."""

    status: str
    start_time: int
    end_time: int | None
    params: dict[str, str]
    tags: dict[str, str]
    datasets: set[tuple[str, str]]


class RemoteExperiment(NamedTuple):
    """An MLflow experiment."""

    id: str
    name: str
    deleted: bool


def is_remote(tracking_uri: str) -> bool:
    """Whether the URI is a server's, not a database's."""
    return not tracking_uri.startswith(("sqlite:", "postgresql", "mysql", "mssql"))


class Tracking:
    """The MLflow client. Every call raises `MirrorUnavailable` when MLflow does not answer or refuses."""

    def __init__(self, uri: str, artifacts_dir: Path | None) -> None:
        self._uri = uri
        # A server has its own setting for artifacts.
        self._artifacts = artifacts_dir.absolute().as_uri() if artifacts_dir and not is_remote(uri) else None
        self._opened: Any = None

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        os.environ.update(NO_PHONE_HOME)
        for name, value in _QUIET_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException

        try:
            if self._opened is None:
                self._opened = self._open()
            yield self._opened
        except (MlflowException, sa.exc.SQLAlchemyError, OSError, json.JSONDecodeError) as error:
            raise MirrorUnavailable(f"MLflow at {_shown(self._uri)} {_trouble(error)}") from None

    def _open(self) -> Any:
        from mlflow.tracking import MlflowClient

        if self._artifacts is not None:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # The first process to open a store makes its tables and MLflow's "Default" experiment. Without this, that
            # experiment's artifacts would be in ./mlruns of the current folder.
            store = SqlAlchemyStore(self._uri, self._artifacts)
            if store.engine.dialect.name == "sqlite":
                _write_ahead(store.engine)
        return MlflowClient(tracking_uri=self._uri)

    def experiment(self, names: Sequence[str]) -> RemoteExperiment:
        """Find an experiment, deleted or not, by one of `names`: its current name, or the name that the mirror gave it. If there
        is none, create it under the last name."""
        with self._client() as client:
            if (found := _named(client, names)) is not None:
                return found
            made = client.create_experiment(
                names[-1], artifact_location=self._artifacts, tags={_TAG_EXPERIMENT: names[-1]}
            )
            return RemoteExperiment(made, names[-1], deleted=False)

    def find_experiment(self, names: Sequence[str]) -> RemoteExperiment | None:
        """Like `experiment`, but returns None instead of creating one."""
        with self._client() as client:
            return _named(client, names)

    def restore_experiment(self, experiment_id: str) -> None:
        """Restore a deleted experiment and its runs."""
        with self._client() as client:
            client.restore_experiment(experiment_id)

    def find_run(self, experiment_id: str, run_id: str) -> RemoteRun | None:
        """The MLflow run of an sftd run, deleted or not."""
        with self._client() as client:
            from mlflow.entities import ViewType

            found = client.search_runs(
                [experiment_id], f"tags.`{TAG_RUN}` = '{run_id}'", ViewType.ALL, max_results=10
            )
        # There are several only if the response to a create_run was lost. The one in use has the highest cursor.
        return max((_remote(r) for r in found), key=lambda r: (r.cursor, not r.deleted, r.uuid), default=None)

    def described(self, uuid: str) -> Described:
        """All data of a run except its points."""
        with self._client() as client:
            run = client.get_run(uuid)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        return Described(
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            dict(run.data.params),
            dict(run.data.tags),
            {(i.dataset.name, i.dataset.digest) for i in inputs},
        )

    def points(self, uuid: str, key: str) -> list[MetricPoint]:
        """All points of a metric, including duplicates."""
        with self._client() as client:
            found = client.get_metric_history(uuid, key)
        return [MetricPoint(m.key, m.value, m.timestamp, m.step) for m in found]

    def create_run(
        self, experiment_id: str, name: str, start_time: int, tags: Mapping[str, str]
    ) -> RemoteRun:
        """Create a run that started at `start_time` (ms since the epoch)."""
        with self._client() as client:
            return _remote(client.create_run(experiment_id, start_time, dict(tags), name))

    def restore_run(self, uuid: str) -> None:
        """Restore a deleted run."""
        with self._client() as client:
            client.restore_run(uuid)

    def describe(self, uuid: str, params: Mapping[str, str], datasets: Sequence[DatasetFacts]) -> None:
        """Write parameters and datasets, which never change. Idempotent."""
        with self._client() as client:
            from mlflow.entities import Dataset, DatasetInput, InputTag, Param

            entities = [Param(key, value) for key, value in params.items()]
            for start in range(0, len(entities), _PARAMS_PER_BATCH):
                client.log_batch(uuid, params=entities[start : start + _PARAMS_PER_BATCH])
            inputs = [
                DatasetInput(
                    Dataset(d.name, d.digest, "local", d.source, profile=d.profile),
                    [InputTag("mlflow.data.context", d.context)],
                )
                for d in datasets
            ]
            if inputs:
                client.log_inputs(uuid, inputs)

    def log(self, uuid: str, points: Sequence[MetricPoint], tags: Mapping[str, str]) -> None:
        """Write points and tags in one request. The store commits the points first, then all tags at once.

        MLflow ignores a point that it already has with equal key, value, time and step.
        """
        with self._client() as client:
            from mlflow.entities import Metric, RunTag

            client.log_batch(
                uuid,
                metrics=[Metric(p.key, p.value, p.timestamp, p.step) for p in points],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )

    def untag(self, uuid: str, keys: Collection[str]) -> None:
        """Delete tags."""
        with self._client() as client:
            for key in keys:
                client.delete_tag(uuid, key)

    def clear(self, uuid: str, metrics: Collection[str], params: Collection[str]) -> None:
        """Remove metrics and parameters, so that a run can be written again in another form. MLflow's API cannot remove them, so
        on a server this does nothing, and they stay beside the new ones."""
        if is_remote(self._uri):
            return
        with self._client() as client, client._tracking_client.store.engine.begin() as connection:
            for name, keys in (("metrics", metrics), ("latest_metrics", metrics), ("params", params)):
                table = sa.table(name, sa.column("run_uuid"), sa.column("key"))
                connection.execute(sa.delete(table).where(table.c.run_uuid == uuid, table.c.key.in_(keys)))

    def log_table(self, uuid: str, file: str, table: Mapping[str, Any]) -> str | None:
        """Write or replace an artifact that MLflow's pages show as a table. Returns the reason if the artifact store refuses it,
        otherwise None."""
        # MLflow's own log_table appends to the table, and needs pandas.
        refused = None
        for _ in range(2):
            with self._client() as client:
                kept = client.get_run(uuid).data.tags.get(_TAG_ARTIFACTS, "[]")
                try:
                    client.log_dict(uuid, dict(table), file)
                except Exception as error:  # noqa: BLE001  each kind of store has its own errors
                    # If MLflow itself is down, the next call raises.
                    refused = _shown(str(error)) or type(error).__name__
                    continue
                mark = {"path": file, "type": "table"}
                tables = json.loads(kept)
                if mark not in tables:
                    client.set_tag(uuid, _TAG_ARTIFACTS, json.dumps([*tables, mark]))
                return None
        return refused

    def register(self, uuid: str, folder: Path, place: str, name: str, tags: Mapping[str, str]) -> str:
        """Copy a model's folder to `place` among a run's artifacts, and make it a version of the registered model `name`.
        Returns the version. If one already has these tags, returns that one and copies nothing."""
        with self._client() as client:
            from mlflow.exceptions import MlflowException

            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            for version in client.search_model_versions(f"name = {_quoted(name)}"):
                if tags.items() <= version.tags.items():
                    return str(version.version)
            client.log_artifacts(uuid, str(folder), place)
            root = client.get_run(uuid).info.artifact_uri
            made = client.create_model_version(
                name, f"{root.rstrip('/')}/{place}", uuid, dict(tags), await_creation_for=0
            )
            return str(made.version)

    def set_status(self, uuid: str, status: str, end_time: int | None) -> None:
        """Set the status, and `end_time` (ms since the epoch) if the status ends the run.

        MLflow cannot remove an end time: a resumed run shows its last one until it ends again.
        """
        with self._client() as client:
            if end_time is None:
                client.update_run(uuid, status=status)
            else:
                client.set_terminated(uuid, status, end_time)


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def _write_ahead(engine: sa.Engine) -> None:
    # Otherwise reading a page blocks the mirror, and each commit takes three syncs. The setting persists in the file.
    with contextlib.suppress(sa.exc.OperationalError), engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _named(client: Any, names: Sequence[str]) -> RemoteExperiment | None:
    """The experiment of the first of these names that exists as a current name or as the mirror's original name."""
    ours: dict[str, Any] | None = None
    for name in names:
        found = client.get_experiment_by_name(name)
        if found is None:
            if ours is None:
                ours = {x.tags[_TAG_EXPERIMENT]: x for x in _experiments(client) if _TAG_EXPERIMENT in x.tags}
            found = ours.get(name)
        if found is not None:
            return RemoteExperiment(found.experiment_id, found.name, found.lifecycle_stage == "deleted")
    return None


def _experiments(client: Any) -> Iterator[Any]:
    from mlflow.entities import ViewType

    token = None
    while True:
        page = client.search_experiments(ViewType.ALL, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _remote(run: Any) -> RemoteRun:
    cursor, covered = parse_cursor(run.data.tags.get(TAG_CURSOR, ""))
    return RemoteRun(
        uuid=run.info.run_id,
        cursor=cursor,
        covered=covered,
        status=run.info.status,
        end_time=run.info.end_time,
        deleted=run.info.lifecycle_stage == "deleted",
        tags=dict(run.data.tags),
    )


def _trouble(error: Exception) -> str:
    """The reason of a failed call, as the predicate of a sentence about MLflow."""
    # If a server is unreachable, the message of requests and urllib3 is three times as long and repeats the address.
    if (away := re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))) and "Max retries exceeded" in str(
        error
    ):
        return f"does not answer: {away[1]}"
    return f"refuses the request: {_shown(str(error))}"


def _shown(text: str) -> str:
    """The beginning of a text, without credentials in URLs."""
    first = without_credentials(text.strip()).partition("\n")[0]
    return first if len(first) <= 400 else first[:400] + "..."
