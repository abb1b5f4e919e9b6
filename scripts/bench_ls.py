"""How long `sftd ls` takes from process start, against a Python that does nothing: `python scripts/bench_ls.py [RUNS]`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from sftd.cli import app
from sftd.domain.events import AttemptClaimed, Event, RunSubmitted, StepCompleted
from sftd.domain.spec import Data, Model, Spec, Trainer, spec_digest
from sftd.operations.context import Context, append_decided
from sftd.store import queue

STEPS = 20
ROUNDS = 7


def fill(runs: int) -> None:
    """Write runs with some steps each into the database of SFTD_HOME."""
    store = app.open_store(app.read_settings())
    context = Context(actor="bench")
    spec = Spec(
        model=Model(partial_pretrain="model"),
        data=Data(train_files=["data"]),
        trainer=Trainer(max_steps=STEPS),
    )
    submitted = RunSubmitted(
        spec=msgspec.to_builtins(spec),
        spec_digest=spec_digest(spec),
        planned_steps=STEPS,
        user="bench",
        data={},
        model={},
        sftd_version="bench",
    )
    events: list[Event] = [submitted, AttemptClaimed(daemon="bench", host="bench", from_step=0)]
    events += [
        StepCompleted(
            step=n,
            epoch=0,
            loss=1 / n,
            grad_norm=1.0,
            lr=1e-5,
            tokens=100,
            tokens_real=200,
            tokens_padded=200,
            tokens_total=100 * n,
            samples=4,
            samples_digest="0" * 64,
            seconds=1.0,
        )
        for n in range(1, STEPS + 1)
    ]
    for n in range(runs):
        with store.write() as tx:
            append_decided(tx, context, f"bench-run-{n:06d}", 0, events, 1)
            queue.enqueue(tx, f"bench-run-{n:06d}", 0, n)


def seconds(argv: list[str]) -> float:
    """Wall seconds of one run of a command."""
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn, so that both meet the same machine."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as home:
        os.environ["SFTD_HOME"] = home
        os.environ.pop("SFTD_DATABASE_URL", None)
        fill(runs)
        sftd = str(Path(sys.executable).with_name("sftd"))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "sftd ls": [sftd, "ls"],
            "sftd ls --json": [sftd, "ls", "--json"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, argv in commands.items():
                times[name].append(seconds(argv))
    floor = statistics.median(times["python -c pass"])
    print(f"{runs} runs, {runs * (STEPS + 2)} events, median of {ROUNDS}")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:16} {median:6.3f} s   {median / floor:5.1f} × an empty Python   (min {min(values):.3f}, max {max(values):.3f})"
        )


if __name__ == "__main__":
    main()
