"""Submit from many clients at once to several daemons with a stub trainer. Checks that each run starts exactly once, and measures
the delay and the claims per second.

    python scripts/bench_queue.py                                    SQLite, in a temporary folder that is deleted
    scripts/with-postgres .venv/bin/python scripts/bench_queue.py    PostgreSQL, throw-away

The daemons (each a process with its own home and slots), the database, the leases and the journals are real. Instead of
torchrun, `sed` writes a finished journal. SFTD_DATABASE_URL, if set, must name a database without tables.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa
import stub_run
from msgspec.structs import replace

from sftd import settings as settings_module
from sftd.cli import app
from sftd.domain.spec.spec import Spec
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.projections import verify
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.migrate import upgrade
from sftd.store.database.tables import events, view_runs
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import JournalWriter

# Placeholder in the journal for the folder of the run's checkpoints.
FOLDER = "CHECKPOINTS"


def write_journal(path: Path) -> None:
    """Write the journal of a trainer that has done its only step."""
    writer = JournalWriter(path)
    writer.append(stub_run.step(1))
    writer.append(stub_run.checkpoint(1, FOLDER))
    writer.close()


def be_daemon(home: str, journal: str, slots: int) -> None:
    """Drive runs until SIGTERM, with `sed` as the trainer."""
    from sftd.daemon.loop import Daemon
    from sftd.launcher import local
    from sftd.launcher.inventory import Inventory

    def argv(_spec: Spec, directory: AttemptDir) -> list[str]:
        there = f"s,{FOLDER},{directory.order().checkpoint_dir},"
        return ["/bin/sed", "-n", "-e", there, "-e", f"w {directory.journal}", journal]

    local.torchrun_argv = argv
    Path(home).mkdir()
    settings = replace(settings_module.read(), home=Path(home))
    daemon = Daemon(app.open_store(settings), settings, Inventory(0, slots))
    signal.signal(signal.SIGTERM, lambda *_: daemon.stop())
    print("ready", flush=True)
    daemon.run()


def submit_at_once(url: str, clients: int, count: int) -> float:
    """Submit from `clients` threads, each with its own connection. Returns the seconds."""
    barrier = threading.Barrier(clients + 1)
    spec, found = stub_run.spec(1), stub_run.preflight(1)

    def client(number: int) -> None:
        store = app.open_store(replace(settings_module.read(), database_url=url))
        context = Context(actor=f"client-{number}")
        barrier.wait()
        for _ in range(number, count, clients):
            submit_all(store, context, [Wish(spec, found)], "bench")
        store.engine.dispose()

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, number) for number in range(clients)]
        barrier.wait()
        started = time.perf_counter()
        for future in futures:
            future.result()
    return time.perf_counter() - started


def wait_until_ended(store: Store, count: int, limit: float) -> None:
    """Wait until `count` runs have succeeded."""
    deadline = time.monotonic() + limit
    done = sa.select(sa.func.count()).select_from(view_runs).where(view_runs.c.status == "succeeded")
    while True:
        with store.read() as connection:
            ended = connection.execute(done).scalar_one()
        if ended == count:
            return
        if time.monotonic() > deadline:
            sys.exit(f"after {limit:.0f} s only {ended} of {count} runs have succeeded")
        time.sleep(0.5)


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def report(store: Store, count: int) -> bool:
    """Print the results from the log. Returns whether each run ran exactly once and the log is sound."""
    with store.read() as connection:
        query = sa.select(events.c.run_id, events.c.type, events.c.recorded_at).order_by(events.c.position)
        rows = connection.execute(query).all()
    at: dict[str, dict[str, int]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for run_id, name, recorded_at in rows:
        at.setdefault(run_id, {})[name] = recorded_at
        seen[run_id, name] += 1
    once = all(
        seen[run_id, name] == 1
        for run_id in at
        for name in ("AttemptClaimed", "AttemptLaunched", "RunSucceeded")
    )
    for name, said in (("AttemptClaimed", "submit to claim"), ("AttemptLaunched", "submit to launch")):
        waits = [(found[name] - found["RunSubmitted"]) / 1e6 for found in at.values()]
        print(
            f"  {said:18} median {percentile(waits, 0.5):.2f} s, p99 {percentile(waits, 0.99):.2f} s, most {max(waits):.2f} s"
        )
    claims = sorted(found["AttemptClaimed"] for found in at.values())
    print(
        f"  claims             {(len(claims) - 1) / ((claims[-1] - claims[0]) / 1e6):.0f}/s, launches and endings among them"
    )
    checked = verify.check_log(store, lambda *_: None)
    print(f"  {len(at)} of {count} runs, each claimed, launched and ended once: {once and len(at) == count}")
    print(f"  the log and its views: {'OK' if not checked.problems else checked.problems[:3]}")
    return once and len(at) == count and not checked.problems


def claims_alone(url: str, count: int, daemons: int) -> None:
    """Measure claims without launches."""
    submit_at_once(url, daemons, count)
    barrier = threading.Barrier(daemons)

    def claimer(number: int) -> list[float]:
        store = app.open_store(replace(settings_module.read(), database_url=url))
        context = Context(actor="claimer")
        took = []
        barrier.wait()
        while True:
            started = time.perf_counter()
            found = attempts.claim(
                store,
                context,
                daemon=f"d{number}",
                host="h",
                fits=lambda run: True,
                lease_micros=3_600_000_000,
            )
            if found is None:
                store.engine.dispose()
                return took
            took.append(time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(daemons) as pool:
        took = [seconds for each in pool.map(claimer, range(daemons)) for seconds in each]
    wall = time.perf_counter() - started
    print(
        f"claims alone, {daemons} claimers in one process: {len(took) / wall:.0f}/s, p99 {1000 * percentile(took, 0.99):.1f} ms"
    )


def main() -> None:
    """Start daemons, submit, wait, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--daemons", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8, help="concurrent runs of each daemon")
    parser.add_argument("--limit", type=float, default=900.0, help="timeout in seconds")
    parser.add_argument("--daemon", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.daemon:
        be_daemon(*options.daemon, slots=options.slots)
        return
    with tempfile.TemporaryDirectory(prefix="sftd-bench-") as folder:
        os.environ["SFTD_HOME"] = folder
        settings = settings_module.read()
        os.environ["SFTD_DATABASE_URL"] = url = settings.database_url
        engine = open_engine(url)
        if Store(engine).schema_revision() is not None:
            sys.exit("the database has tables: name an empty one, which this benchmark may fill")
        upgrade(engine)
        journal = Path(folder, "journal")
        write_journal(journal)
        argv = [sys.executable, __file__, "--slots", str(options.slots), "--daemon"]
        daemons = [
            subprocess.Popen([*argv, f"{folder}/home-{n}", str(journal)], stdout=subprocess.PIPE, text=True)
            for n in range(options.daemons)
        ]
        try:
            for daemon in daemons:
                assert daemon.stdout is not None
                assert daemon.stdout.readline() == "ready\n"
            print(
                f"{engine.dialect.name}: {options.clients} clients, {options.runs} runs, {options.daemons} daemons of "
                f"{options.slots} slots; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            )
            took = submit_at_once(url, options.clients, options.runs)
            print(f"  submitted          {options.runs / took:.0f}/s")
            wait_until_ended(Store(engine), options.runs, options.limit)
        finally:
            for daemon in daemons:
                daemon.terminate()
            for daemon in daemons:
                daemon.wait()
        fine = report(Store(engine), options.runs)
        claims_alone(url, options.runs, options.daemons)
        engine.dispose()
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
