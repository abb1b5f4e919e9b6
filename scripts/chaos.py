"""Inject faults into real runs under real daemons and check that the results do not change (tests/builders/chaos/chaos.py):

    python scripts/chaos.py [--faults 200] [--seed 5]
    scripts/with-postgres python scripts/chaos.py --daemons 2

Uses the PostgreSQL server of SFTD_DATABASE_URL if set (it is restarted, and must have no tables), else a SQLite file with one
daemon. Prints each fault and a table. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from tests.builders.chaos.chaos import Chaos  # noqa: E402
from tests.builders.chaos.chaos_runs import make_reference  # noqa: E402
from tests.builders.process.tiny_llama import write_tiny_model  # noqa: E402


def main() -> int:
    """Run it. Returns 1 if a check failed."""
    url = os.environ.get("SFTD_DATABASE_URL")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="inject no fault after this time")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="runs in the queue at any time")
    parser.add_argument(
        "--daemons", type=int, default=2 if url else 1, help="number of daemons, each with a home"
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    arguments = parser.parse_args()
    if arguments.daemons > 1 and not url:
        parser.error("a SQLite file is for one daemon; use scripts/with-postgres")
    # So that SIGTERM, too, cleans up processes, mounts and files.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sftd-chaos-") as temporary:
        folder = arguments.keep or Path(temporary)
        model = write_tiny_model(folder / "model")
        print("training each run once, undisturbed", flush=True)
        reference = make_reference(folder / "undisturbed", model)
        chaos = Chaos(
            folder / "disturbed",
            model,
            reference,
            seed=arguments.seed,
            database_url=url,
            daemons=arguments.daemons,
            runs=arguments.runs,
            say=lambda line: print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True),
        )
        with chaos:
            tally = chaos.run(arguments.faults, seconds=60 * arguments.minutes)
    print()
    print("\n".join(tally.table("PostgreSQL" if url else "SQLite")))
    print(f"\n{time.monotonic() - started:.0f} s, seed {arguments.seed}; causes: {json.dumps(tally.causes)}")
    for what in tally.wrong:
        print(f"WRONG  {what}")
    return bool(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
