"""Measure the speed and memory of the MLflow mirror with a long log.

    python scripts/bench_mirror.py                    # a million points into MLflow's SQLite
    python scripts/bench_mirror.py --server           # the same through an MLflow server of one worker
    python scripts/bench_mirror.py --points 200000 --runs 20

Real events, a real log and a real MLflow. Afterwards every point is read back and compared with the log. The baseline is a
loop of bare `MlflowClient.log_batch` calls with 1000 metrics, on a new store, in the same run.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil

from sftd.domain.log import events as e
from sftd.domain.spec.spec import Spec
from sftd.projections import views
from sftd.projections.mirrors.feed import Feed
from sftd.projections.mirrors.mlflow import check as mlflow_check
from sftd.projections.mirrors.mlflow.client import NO_PHONE_HOME, Tracking
from sftd.projections.mirrors.mlflow.mapping import points
from sftd.projections.mirrors.mlflow.writer import MlflowWriter, position_name
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.schema import metadata
from sftd.store.log import event_store

START = 1_700_000_000_000_000
BATCH = 5000


def step(number: int) -> e.StepCompleted:
    return e.StepCompleted(
        step=number,
        epoch=0,
        loss=2 + 1 / number,
        grad_norm=1 + 1 / number,
        lr=1e-5 / number,
        tokens=8000,
        tokens_real=9000,
        tokens_padded=9500,
        tokens_total=8000 * number,
        samples=32,
        samples_digest="0" * 64,
        seconds=0.5 + 1 / number,
        mfu=0.4 + 1 / (number + 10),
        peak_memory_bytes=60_000_000_000 + number,
    )


def write_log(store: Store, runs: int, steps: int) -> None:
    submitted = e.RunSubmitted(
        spec=msgspec.to_builtins(Spec()),
        spec_digest="d" * 64,
        planned_steps=steps,
        user="bench",
        data={},
        model={},
        sftd_version="bench",
    )
    for run in range(runs):
        stream: list[e.Event] = [submitted, e.AttemptClaimed(daemon="d", host="h", from_step=0)]
        stream += (step(n) for n in range(1, steps + 1))
        for start in range(0, len(stream), BATCH):
            new = [
                e.NewEvent(
                    event=event,
                    event_id=str(uuid.uuid4()),
                    occurred_at=START + (start + i) * 500_000,
                    actor="bench",
                    attempt=1,
                )
                for i, event in enumerate(stream[start : start + BATCH])
            ]
            with store.write() as tx:
                event_store.append(tx, f"run-{run}", start, new, START)


class Watch:
    """The mirror's `should_stop`: prints progress, speed and memory between two requests."""

    def __init__(self, total: int) -> None:
        self._process = psutil.Process()
        self.points = 0
        self._next = self._every = total // 10
        self._began = self._last = time.perf_counter()
        self._last_points = 0
        self.rss: list[float] = []

    def __call__(self) -> bool:
        if self.points >= self._next:
            now = time.perf_counter()
            rate = (self.points - self._last_points) / (now - self._last)
            self.rss.append(self._process.memory_info().rss / 2**20)
            print(f"{self.points:>9} points  {rate:>7.0f} a second  {self.rss[-1]:>6.0f} MiB", flush=True)
            self._last, self._last_points = now, self.points
            self._next += self._every
        return False


def bare(folder: Path, count: int) -> float:
    """Metrics per second of MLflow's client alone, in a process with Python's default settings."""
    code = f"""
import os, time
os.environ.update({NO_PHONE_HOME!r} | {{"MLFLOW_LOGGING_LEVEL": "WARNING"}})
from mlflow.entities import Metric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
SqlAlchemyStore("sqlite:///{folder}/bare.db", "{folder}/bare")
client = MlflowClient("sqlite:///{folder}/bare.db")
run = client.create_run(client.create_experiment("bare")).info.run_id
began, step = time.perf_counter(), 0
for _ in range({count} // 1000):
    batch = []
    for _ in range(125):
        step += 1
        batch += [Metric(f"metric_{{k}}", k + 1 / step, 1_700_000_000_000 + step * 500, step) for k in range(8)]
    client.log_batch(run, metrics=batch)
print({count} // 1000 * 1000 / (time.perf_counter() - began))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@contextmanager
def server(uri: str, artifacts: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    argv += ["--artifacts-destination", artifacts.absolute().as_uri()]
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env = os.environ | NO_PHONE_HOME | jobs | {"MLFLOW_BACKEND_STORE_URI": uri}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, env=env, **quiet)
    try:
        while process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def measure(folder: Path, uri: str, runs: int, steps: int) -> None:
    # As in the `sftd` command. MLflow creates ten objects per metric, but no cycles.
    gc.set_threshold(100_000)
    engine = open_engine(f"sqlite:///{folder}/sftd.db")
    metadata.create_all(engine)
    store = Store(engine, before_commit=(views.catch_up,))
    began = time.perf_counter()
    write_log(store, runs, steps)
    per_step = len(points(_recorded(step(1)), {}))
    total = runs * steps * per_step
    print(
        f"a log of {runs} runs, {steps} steps each, {per_step} metrics a step: {time.perf_counter() - began:.0f} s"
    )

    mirror = Feed(store, MlflowWriter(store, uri, folder / "artifacts"), position_name(uri))
    watch = Watch(total)
    log = mirror._tracking.log

    def counted(run: str, found: list[object], tags: dict[str, str]) -> None:
        log(run, found, tags)  # type: ignore[arg-type]
        watch.points += len(found)

    mirror._tracking.log = counted  # type: ignore[method-assign, assignment]
    began, used = time.perf_counter(), time.process_time()
    mirror.sync(watch)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    growth = max(watch.rss[1:], default=0) - watch.rss[0]
    print(f"{watch.points} points in {seconds:.1f} s: {watch.points / seconds:.0f} a second", end=", ")
    print(f"{used:.1f} s of CPU in this process; memory grew by {growth:.0f} MiB after the first tenth")
    tracking = Tracking(uri, folder / "artifacts")
    checked = [
        mlflow_check.compare_run(store, tracking, "", *run) for run in mlflow_check.versions(store).items()
    ]
    assert all(run.is_equal for run in checked), checked
    print(f"read back: {sum(run.points for run in checked)} points, each as the log has it")
    engine.dispose()


def _recorded(event: e.Event) -> e.Recorded:
    return e.Recorded(
        position=1, event_id="", run_id="", version=1, type=type(event).__name__, schema_version=2,
        occurred_at=START, recorded_at=START, attempt=1, actor="", causation_id=None, event=event,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument(
        "--server", action="store_true", help="through an MLflow server instead of its SQLite file"
    )
    parser.add_argument(
        "--bare", type=int, default=100_000, help="points for the bare client; 0 leaves it out"
    )
    arguments = parser.parse_args()
    steps = arguments.points // 8 // arguments.runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.bare:
            print(f"bare log_batch(1000): {bare(folder, arguments.bare):.0f} metrics a second")
        uri = f"sqlite:///{folder}/mlflow.db"
        if not arguments.server:
            measure(folder, uri, arguments.runs, steps)
            return
        with server(uri, folder / "artifacts") as address:
            measure(folder, address, arguments.runs, steps)


if __name__ == "__main__":
    main()
