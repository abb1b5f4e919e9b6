"""Measure the database side on a database of a chosen size: reading commands from process start, appends, the lag from journal
to database, and the trainer's cost to emit a step.

    python scripts/bench_store.py                                    SQLite, in a temporary folder that is deleted
    scripts/with-postgres .venv/bin/python scripts/bench_store.py    PostgreSQL, throw-away

The defaults are the sizes of docs/benchmarks.md; `--runs 100 --events 20000` is quick. SFTD_DATABASE_URL, if set, must name a
database without tables.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd import settings as settings_module
from sftd.cli import COMMANDS, app
from sftd.daemon.supervisor import Supervisor
from sftd.domain.log import events as e
from sftd.domain.queue.demand import Demand
from sftd.domain.run.state import Run
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Trainer
from sftd.domain.spec.spec import Spec, spec_digest
from sftd.launcher.local import LocalAttempt
from sftd.operations.context import Context, append_decided
from sftd.operations.driving import attempts
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.migrate import upgrade
from sftd.store.database.tables import events, projection_positions, view_runs
from sftd.store.database.tables import queue as queue_table
from sftd.store.log import event_store, runs
from sftd.store.queue import leases
from sftd.store.queue.leases import Lease
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import Line

CONTEXT = Context(actor="bench")
ROUNDS = 9
SAVES = 4
LEASE_MICROS = 3_600_000_000
COLUMNS = [c.name for c in events.columns if c.name != "position"]


def step(number: int) -> e.StepCompleted:
    """A step as the trainer reports it."""
    return e.StepCompleted(
        step=number,
        epoch=number // 1000,
        loss=2.0 + 1.0 / number,
        grad_norm=0.9 + 1.0 / (number + 7),
        lr=1e-5 * (1 - 1.0 / (number + 3)),
        tokens=61234 + number % 977,
        tokens_real=65000,
        tokens_padded=65536,
        tokens_total=61234 * number,
        samples=32,
        samples_digest=f"{number:064x}",
        seconds=0.9876543 + number % 13 / 1000,
        mfu=0.5123456789,
        peak_memory_bytes=43_500_000_000,
    )


def history(steps: int, ending: e.Event | None) -> list[e.Event]:
    """All events of a run of one attempt."""
    spec = Spec(
        model=Model(partial_pretrain="model"),
        data=Data(train_files=["train.parquet"]),
        trainer=Trainer(max_steps=max(1, steps), project_name="bench", experiment_name="store"),
    )
    listed: list[e.Event] = [
        e.RunSubmitted(
            spec=msgspec.to_builtins(spec),
            spec_digest=spec_digest(spec),
            planned_steps=steps,
            user="bench",
            data={"train": {"digest": "0" * 64}},
            model={},
            sftd_version="bench",
        )
    ]
    if ending is None and steps == 0:
        return listed
    listed += [
        e.AttemptClaimed(daemon="bench", host="bench", from_step=0),
        e.AttemptLaunched(
            pid=1, create_time=1.5, host="bench", directory="d", argv=["torchrun"], devices=["cpu:0"]
        ),
        e.ModelLoaded(
            architecture="Llama", parameters=1, dtype="bf16", device="cuda", seconds=1.0, environment={}
        ),
    ]
    for number in range(1, steps + 1):
        listed.append(step(number))
        if number % max(1, steps // SAVES) == 0:
            listed.append(e.ValidationCompleted(step=number, loss=2.0, tokens=1000, rows=10, seconds=1.0))
            listed.append(
                e.CheckpointPublished(
                    step=number,
                    path=f"checkpoints/step-{number}",
                    bytes=10**9,
                    manifest_digest="0" * 64,
                    seconds=1.0,
                )
            )
    return [*listed, *([ending] if ending else [])]


class Fast:
    """Bulk inserts by the fastest way of each driver, to set up the database."""

    def __init__(self, store: Store) -> None:
        self._raw: Any = store.engine.raw_connection()
        self._postgres = store.engine.dialect.name == "postgresql"
        if not self._postgres:
            self._raw.cursor().execute("PRAGMA synchronous=OFF")
            self._raw.cursor().execute("PRAGMA cache_size=-4000000")
            self._raw.cursor().execute("BEGIN IMMEDIATE")

    def insert(self, table: str, columns: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
        """Insert rows."""
        names = ", ".join(f'"{name}"' for name in columns)
        cursor = self._raw.cursor()
        if self._postgres:
            with cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        else:
            marks = ", ".join("?" * len(columns))
            cursor.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608

    def done(self) -> None:
        """Commit, and do the work of the server's autovacuum now."""
        self._raw.commit()
        if self._postgres:
            self._raw.driver_connection.autocommit = True
            for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
                self._raw.cursor().execute(statement)
        else:
            self._raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._raw.close()
        # Write-back must not disturb the measurements.
        os.sync()


def event_ids(count: int) -> Iterator[str]:
    """Random ids, like those of journal lines."""
    text = os.urandom(16 * count).hex()
    for at in range(0, 32 * count, 32):
        h = text[at : at + 32]
        yield f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def fill(store: Store, count: int, total: int, longest: int) -> tuple[str, str]:
    """Write `count` runs with `total` events; one run has `longest` steps. Returns the ids of an ordinary run and the longest.

    One run of each kind is appended in the normal way, with its views. The others are copies of its rows with other ids.
    """
    steps = max(SAVES, (total - longest) // count)
    succeeded = e.RunSucceeded(steps=steps, tokens=0, final_checkpoint="c")
    kinds = {
        "succeeded": history(steps, succeeded),
        "failed": history(steps, e.RunFailed(cause="crash", message="it broke")),
        "running": history(steps, None),
        "queued": history(0, None),
        "longest": history(longest, succeeded),
    }
    templates: dict[str, tuple[list[tuple[Any, ...]], dict[str, Any], Run]] = {}
    for name, listed in kinds.items():
        run_id = f"template-{name}"
        with store.write() as tx:
            append_decided(tx, CONTEXT, run_id, 0, listed, 1)
            leases.enqueue(tx, run_id, 0, 0)
            leases.leave(tx, run_id)
        with store.read() as connection:
            rows = [tuple(row[c] for c in COLUMNS) for row in event_store.raw_rows(connection, run_id)]
            view = (
                connection.execute(sa.select(view_runs).where(view_runs.c.run_id == run_id)).mappings().one()
            )
            templates[name] = (rows, dict(view), runs.load_run(connection, run_id))
    fast = Fast(store)
    views, queued = [], []
    for n in range(count):
        name = {0: "queued", 1: "running", 2: "failed"}.get(n % 100, "succeeded")
        run_id = f"bench-run-{n:06d}"
        rows, view, run = templates[name]
        at = run.submitted_at + n * 1_000_000
        fast.insert(
            "events",
            COLUMNS,
            ((key, run_id, *row[2:]) for key, row in zip(event_ids(len(rows)), rows, strict=True)),
        )
        state = msgspec.structs.replace(run, run_id=run_id, submitted_at=at)
        views.append(
            tuple((view | {"run_id": run_id, "submitted_at": at, "state": runs.encode_state(state)}).values())
        )
        leased = name == "running"
        state_name = {"queued": "waiting", "running": "leased"}.get(name, "idle")
        expires = at + LEASE_MICROS if leased else None
        queued.append(
            (run_id, state_name, 0, at, at, 1 if leased else None, "t" if leased else None, "bench", expires)
        )
    fast.insert("view_runs", [c.name for c in view_runs.columns], iter(views))
    fast.insert("queue", [c.name for c in queue_table.columns], iter(queued))
    # As `submit` writes them.
    demand = Demand.of(templates["queued"][2].spec)
    encoded = msgspec.json.encode(demand).decode()
    fast.insert(
        "queue_demands", ["run_id", "demand"], ((row[0], encoded) for row in queued if row[1] != "idle")
    )
    fast.done()
    with store.write() as tx:
        last = event_store.last_position(tx.connection)
        tx.execute(sa.update(projection_positions).values(position=last))
    return f"bench-run-{count // 2 + 3:06d}", "template-longest"


def seconds(argv: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of one run of a command."""
    # An installed sftd has compiled modules.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def reading(ordinary: str, longest: str) -> None:
    """Measure the reading commands, interleaved so that a load of the machine affects all."""
    sftd = str(Path(sys.executable).with_name("sftd"))
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "sftd ls": [sftd, "ls"],
        "sftd ls --json": [sftd, "ls", "--json"],
        "sftd ls -s running": [sftd, "ls", "-s", "running"],
        "sftd show RUN": [sftd, "show", ordinary],
        "sftd show PREFIX": [sftd, "show", longest[:-2]],
        "sftd show LONGEST": [sftd, "show", longest],
    }
    commands |= {f"sftd {name}": [sftd, name] for name in ("queue", "nodes") if name in COMMANDS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, argv in commands.items():
            times[name].append(seconds(argv))
    print(f"\nfrom process start, {ROUNDS} times each, load {os.getloadavg()[0]:.1f}")
    print(f"  {'seconds':20} {'median':>7} {'min':>7} {'max':>7} {'CPU':>7}")
    for name, values in times.items():
        wall, cpu = zip(*values, strict=True)
        print(
            f"  {name:20} {statistics.median(wall):7.3f} {min(wall):7.3f} {max(wall):7.3f} {statistics.median(cpu):7.3f}"
        )


def claimed(store: Store, run_id: str, steps: int) -> Lease:
    """Submit and claim a run."""
    with store.write() as tx:
        append_decided(tx, CONTEXT, run_id, 0, [*history(0, None)], None)
        leases.enqueue(tx, run_id, 1000, 0)
    found = attempts.claim(
        store, CONTEXT, daemon="bench", host="bench", fits=lambda run: True, lease_micros=LEASE_MICROS
    )
    assert found is not None
    assert found.lease.run_id == run_id
    return found.lease


def appending(store: Store, count: int, batch: int) -> None:
    """Measure appends: journal lines as a daemon records them, and the event store alone."""
    lease = claimed(store, "append-recorded", count)
    lines = [Line(number=n, occurred_at=n, event=step(n)) for n in range(1, count + 1)]
    started = time.perf_counter()
    for part in batched(lines, batch):
        attempts.record(store, CONTEXT, lease, list(part), part[-1].number * 400, {})
    whole = time.perf_counter() - started
    bare = Store(store.engine)
    new = [
        e.NewEvent(event=line.event, event_id=key, occurred_at=line.number, actor="trainer", attempt=1)
        for key, line in zip(event_ids(count), lines, strict=True)
    ]
    started = time.perf_counter()
    for at, part in enumerate(batched(new, batch)):
        with bare.write() as tx:
            event_store.append(tx, "append-bare", at * batch, part, 1)
    alone = time.perf_counter() - started
    print(f"\nappending {count} events, {batch} a transaction, load {os.getloadavg()[0]:.1f}")
    print(f"  the event store alone                {count / alone:9,.0f} events/s")
    print(f"  recorded: lease, ids, views, cursor  {count / whole:9,.0f} events/s")


def emit(path: str, rate: float, duration: float) -> None:
    """Act as a trainer that reports `rate` steps per second."""
    from sftd.wire.attempt.journal import JournalWriter

    writer = JournalWriter(Path(path))
    started = time.perf_counter()
    for n in range(1, int(rate * duration) + 1):
        if (wait := started + n / rate - time.perf_counter()) > 0:
            time.sleep(wait)
        writer.append(step(n))
    writer.close()


def lag(store: Store, folder: Path, rate: float, duration: float) -> None:
    """Measure the time from the trainer's append to the commit, with the daemon's supervisor and its polling."""
    settings = settings_module.read()
    directory = AttemptDir(folder)
    lease = claimed(store, "lag", int(rate * duration))
    supervisor = Supervisor(store, CONTEXT, settings, lease, LocalAttempt(directory, None, lease.token))
    trainer = subprocess.Popen(
        [sys.executable, __file__, "--emit", str(directory.journal), str(rate), str(duration)]
    )
    lags: list[int] = []
    taken, ended = 0, False
    while taken < int(rate * duration):
        if ended:
            raise SystemExit(f"the journal ended after {taken} lines")
        ended = trainer.poll() is not None
        if not (new := supervisor.ingest()):
            time.sleep(settings.poll_seconds)
            continue
        now = CONTEXT.now()
        with store.read() as connection:
            query = sa.select(events.c.occurred_at).where(
                events.c.run_id == "lag", events.c.type == "StepCompleted"
            )
            recent = connection.execute(query.order_by(events.c.version.desc()).limit(new)).scalars()
            lags += [now - at for at in recent]
        taken += new
        time.sleep(settings.poll_seconds)
    trainer.wait()
    lags.sort()
    ms = [lags[int(q * (len(lags) - 1))] / 1000 for q in (0.5, 0.99, 1.0)]
    print(
        f"\njournal to database at {rate:.0f} events/s for {duration:.0f} s, polled every {settings.poll_seconds} s"
    )
    print(f"  lag: median {ms[0]:.0f} ms, p99 {ms[1]:.0f} ms, most {ms[2]:.0f} ms")


def emitting(folder: Path, count: int) -> None:
    """Measure the cost of a step's event in the trainer's loop, with the fsync thread active."""
    from sftd.trainer.runtime.reporter import Reporter

    reporter = Reporter(AttemptDir(folder), is_reporter=True)
    listed = [step(n) for n in range(1, count + 1)]
    clock: Callable[[], int] = time.perf_counter_ns
    costs = []
    for event in listed:
        started = clock()
        reporter.emit(event)
        costs.append(clock() - started)
    reporter.close()
    costs.sort()
    mean = sum(costs) / count / 1000
    us = [costs[int(q * (count - 1))] / 1000 for q in (0.5, 0.99)]
    print(
        f"\nemitting a step, {count} times\n  mean {mean:.1f} µs, median {us[0]:.1f} µs, p99 {us[1]:.1f} µs"
    )


def main() -> None:
    """Build, measure, delete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--longest", type=int, default=200_000, help="steps of the longest run")
    parser.add_argument("--append", type=int, default=100_000, help="events to append")
    parser.add_argument(
        "--batch", type=int, default=2000, help="events per transaction (a daemon's maximum: 2000)"
    )
    parser.add_argument("--rate", type=float, default=1000.0, help="events per second for the lag")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of the lag measurement")
    parser.add_argument("--emit", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.emit:
        emit(options.emit[0], float(options.emit[1]), float(options.emit[2]))
        return
    with tempfile.TemporaryDirectory(prefix="sftd-bench-") as folder:
        os.environ["SFTD_HOME"] = f"{folder}/home"
        settings = settings_module.read()
        app.make_home(settings)
        engine = open_engine(settings.database_url)
        if Store(engine).schema_revision() is not None:
            sys.exit("the database has tables: name an empty one, which this benchmark may fill")
        upgrade(engine)
        store = app.open_store(settings)
        started = time.perf_counter()
        ordinary, longest = fill(store, options.runs, options.events, min(options.longest, options.events))
        with store.read() as connection:
            made = connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one()
            listed = connection.execute(sa.select(sa.func.count()).select_from(view_runs)).scalar_one()
        took = time.perf_counter() - started
        print(
            f"{engine.dialect.name}: {listed} runs, {made:,} events, one run of them with {options.longest:,} steps"
        )
        print(f"built in {took:.0f} s; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        reading(ordinary, longest)
        appending(store, options.append, options.batch)
        for name in ("lag", "emit"):
            Path(folder, name).mkdir()
        lag(store, Path(folder, "lag"), options.rate, options.seconds)
        emitting(Path(folder, "emit"), options.append)
        engine.dispose()
        store.engine.dispose()


if __name__ == "__main__":
    main()
