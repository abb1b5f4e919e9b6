"""Measure a daemon with a thousand concurrent runs on Slurm: time of a tick, calls to the controller, lag between journals and
log, CPU and disk.

    python scripts/bench_slurm.py                                    SQLite, in a temporary folder that is deleted
    scripts/with-postgres .venv/bin/python scripts/bench_slurm.py    PostgreSQL, throw-away

The daemon, its database, its launcher and the job scripts are real. The cluster and the ranks are stubs: `sbatch`, `squeue`
and `scancel` take as long as with a busy controller, and one process writes all journals. SFTD_DATABASE_URL, if set, must
name a database without tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import sqlalchemy as sa
import stub_run
from msgspec.structs import replace

from sftd import settings as settings_module
from sftd.cli import app
from sftd.daemon.loop import Daemon
from sftd.launcher.choosing import ByName
from sftd.launcher.inventory import Inventory
from sftd.launcher.local import LocalAttempt
from sftd.launcher.slurm import commands as slurm_commands
from sftd.launcher.slurm.attempt import SlurmLauncher
from sftd.launcher.slurm.controller import Controller
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.migrate import upgrade
from sftd.store.database.tables import events, view_runs
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import JournalWriter

# A job's number is its line in the file `jobs`. The stub cluster writes the output of squeue.
SBATCH = """#!/bin/sh
sleep {latency}
for script; do :; done
exec 9>>{folder}/lock
flock 9
echo "${{script%/job.sh}}" >> {folder}/jobs
wc -l < {folder}/jobs
"""
SQUEUE = "#!/bin/sh\nsleep {latency}\ncat {folder}/squeue\n"
SCANCEL = "#!/bin/sh\nsleep {latency}\n"


def write_stubs(folder: Path, latency: float, sbatch: float) -> None:
    """Write the stub commands and put them first on the PATH."""
    (folder / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        file = folder / "bin" / name
        file.write_text(text.format(folder=folder, latency=sbatch if name == "sbatch" else latency))
        file.chmod(0o700)
    (folder / "squeue").touch()
    (folder / "jobs").touch()
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"


class StubRun:
    """A stub of a job's ranks: writes its journal."""

    def __init__(self, folder: str) -> None:
        self.directory = AttemptDir(folder)
        self._order = self.directory.order()
        self._journal = JournalWriter(self.directory.journal)
        self._step = 0
        self.is_over = False

    def step(self) -> None:
        """Write one step; after the last one, a checkpoint and the exit code."""
        self._step += 1
        self._journal.append(stub_run.step(self._step))
        if self._step == self._order.planned_steps:
            self._journal.append(stub_run.checkpoint(self._step, self._order.checkpoint_dir))
            self._journal.close()
            self.directory.write_exit_code(0)
            self.is_over = True


def be_cluster(folder: Path, seconds_per_step: float) -> None:
    """Run every job that was submitted, until killed."""
    runs: list[StubRun] = []
    began = time.monotonic()
    done = 0
    while True:
        folders = (folder / "jobs").read_text().splitlines()
        runs += [StubRun(name) for name in folders[len(runs) :]]
        lines = [
            f"{number}|{'COMPLETED' if run.is_over else 'RUNNING'}|0|n{number % 250}|0|None|{run.directory.path}|\n"
            for number, run in enumerate(runs, 1)
        ]
        (folder / "squeue.new").write_text("".join(lines))
        (folder / "squeue.new").rename(folder / "squeue")
        # Independent runs report at different times, so spread them evenly over the time of a step.
        while done < (time.monotonic() - began) / seconds_per_step * max(1, len(runs)) and runs:
            run = runs[done % len(runs)]
            if not run.is_over:
                run.step()
            done += 1
        time.sleep(0.05)


class Watch:
    """The measurements since `begin`."""

    def __init__(self, store: Store, controller: Controller, calls: Counter[str]) -> None:
        self._store, self._controller, self._calls = store, controller, calls
        self.begin()

    def _events(self) -> int:
        with self._store.read() as connection:
            return int(connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0)

    def begin(self) -> None:
        """Start to measure."""
        self.ticks: list[float] = []
        self.tick_cpu: list[float] = []
        self._at, self._cpu, self._before = time.monotonic(), time.process_time(), self._events()
        self._calls_before = Counter(self._calls)

    def report(self, name: str, lag: list[int] | None = None) -> None:
        """Print the measurements."""
        seconds = time.monotonic() - self._at
        ticks = sorted(self.ticks)
        calls = self._calls - self._calls_before
        each = ", ".join(f"{name} {60 * n / seconds:.1f}" for name, n in sorted(calls.items()))
        print(f"{name}: {seconds:.0f} s; load of the machine {os.getloadavg()[0]:.0f}")
        print(
            f"  tick          median {1000 * statistics.median(ticks):.0f} ms, "
            f"99 % {1000 * ticks[int(0.99 * (len(ticks) - 1))]:.0f} ms, longest {1000 * ticks[-1]:.0f} ms ({len(ticks)} ticks)"
        )
        used = sorted(self.tick_cpu)
        print(
            f"  of it CPU     median {1000 * statistics.median(used):.0f} ms, longest {1000 * used[-1]:.0f} ms"
        )
        print(f"  log           {(self._events() - self._before) / seconds:.0f} events/s")
        if lag:
            print(
                f"  journals      at most {max(lag)} lines not in the log yet, median {statistics.median(lag):.0f}"
            )
        print(f"  CPU           {100 * (time.process_time() - self._cpu) / seconds:.0f} % of a core")
        print(f"  calls/minute  {each or 'none'}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=200, help="additional runs that wait in the queue")
    parser.add_argument("--step-seconds", type=float, default=5.0, help="time of a step of each run")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the measurement")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds that squeue takes")
    parser.add_argument("--sbatch", type=float, default=0.03, help="seconds that sbatch takes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as name:
        measure(Path(name), given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    """Submit, watch them start, watch them run."""
    write_stubs(folder, given.latency, given.sbatch)
    found = settings_module.read()
    url = os.environ.get("SFTD_DATABASE_URL", f"sqlite:///{folder}/sftd.db")
    settings = replace(
        found, home=folder / "home", database_url=settings_module.full_database_url(url), poll_seconds=0.25
    )
    settings.home.mkdir()
    engine = open_engine(settings.database_url)
    upgrade(engine)
    engine.dispose()
    store = app.open_store(settings)
    steps = 10**6
    wish = Wish(stub_run.spec(steps, "slurm"), stub_run.preflight(steps))
    submit_all(store, Context(actor="bench"), [wish] * (given.runs + given.waiting), "bench")
    calls: Counter[str] = Counter()

    def run(argv: list[str], *rest: object) -> tuple[int, str, str]:
        calls[argv[0]] += 1
        return slurm_commands.run_command(argv, *rest)  # type: ignore[arg-type]

    controller = Controller(settings.slurm_poll_seconds, run)
    launcher = ByName({"local": LocalAttempt, "slurm": SlurmLauncher(controller)})
    daemon = Daemon(store, settings, Inventory(0, 2, {"slurm": given.runs}), launcher)
    cluster = multiprocessing.get_context("fork").Process(
        target=be_cluster, args=(folder, given.step_seconds), daemon=True
    )
    cluster.start()
    print(
        f"{given.runs} runs of a step each {given.step_seconds:g} s, {given.waiting} more wait; squeue takes "
        f"{given.latency:g} s; {store.engine.dialect.name}; {os.cpu_count()} cores\n"
    )
    try:
        watch = Watch(store, controller, calls)
        daemon._register()

        def tick() -> None:
            began, cpu = time.monotonic(), time.thread_time()
            busy = daemon.tick()
            watch.tick_cpu.append(time.thread_time() - cpu)
            watch.ticks.append(time.monotonic() - began)
            if not busy:
                time.sleep(settings.poll_seconds)

        running = sa.select(sa.func.count()).select_from(view_runs).where(view_runs.c.status == "running")
        while True:
            tick()
            with store.read() as connection:
                if connection.execute(running).scalar_one() == given.runs:
                    break
        watch.report("all start")
        watch.begin()
        size = _database_bytes(store, folder)
        count = watch._events()
        lag = []
        until = time.monotonic() + given.seconds
        while time.monotonic() < until:
            tick()
            lag.append(
                sum(s.backlog()[0] for s in daemon._driven.supervisors.values())
                if len(watch.ticks) % 10 == 0
                else 0
            )
        watch.report("all run", [n for n in lag if n])
        grown = _database_bytes(store, folder) - size
        print(f"  database      {grown / max(1, watch._events() - count):.0f} bytes an event")
        print(f"  memory        {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")
    finally:
        cluster.kill()
        controller.stop()


def _database_bytes(store: Store, folder: Path) -> int:
    if store.engine.dialect.name == "sqlite":
        return sum(path.stat().st_size for path in folder.glob("sftd.db*"))
    with store.read() as connection:
        return int(connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one())


if __name__ == "__main__":
    sys.exit(main())
