"""Kill runs while they save and delete checkpoints, and check the result (see tests/builders/process/kill_while_saving.py):

    python scripts/kill_while_saving.py [--kills 200] [--seed 4]

Half of the killed runs save asynchronously. Prints a table. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.builders.process.kill_while_saving import KillWhileSaving, Tally  # noqa: E402
from tests.builders.warm_ranks import WarmTrainer  # noqa: E402


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a tiny random model and its data. Returns both folders."""
    model, data = folder / "model", folder / "data"
    scripts = ROOT / "scripts"
    for argv in (
        ("write_random_model.py", "tiny", str(model)),
        ("write_random_data.py", str(data), "--rows", "160", "--vocab", "250", "--length", "fixed:48"),
    ):
        subprocess.run([sys.executable, str(scripts / argv[0]), *argv[1:]], check=True)
    return model, data


def table(tallies: dict[str, Tally]) -> Iterable[str]:
    """The tallies side by side, in Markdown."""
    yield "| | " + " | ".join(tallies) + " |"
    yield "|---|" + "---|" * len(tallies)

    def row(name: str, values: Iterable[object]) -> str:
        return f"| {name} | " + " | ".join(str(v) for v in values) + " |"

    each = tallies.values()
    yield row("kills", (t.kills for t in each))
    for aim in sorted({a for t in each for a in t.aims}):
        yield row(f"… of which after the beginning of {aim}", (t.aims[aim] for t in each))
    for found in sorted({f for t in each for f in t.found}):
        yield row(f"a kill left: {found}", (t.found[found] for t in each))
    yield row("runs that ended", (t.runs for t in each))
    yield row("steps compared with the undisturbed run", (t.steps for t in each))
    yield row("checkpoints verified after kills", (t.verified for t in each))
    yield row("**wrong**", (len(t.wrong) for t in each))


def main() -> int:
    """Run all trials. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4)
    arguments = parser.parse_args()
    started = time.monotonic()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="sftd-kills-") as name:
        folder = Path(name)
        model, data = write_inputs(folder)
        warm = WarmTrainer()
        try:
            for label, is_async in (("asynchronous", True), ("synchronous", False)):
                trials = KillWhileSaving(warm, folder / label, model, data, arguments.seed, is_async=is_async)
                tallies[label] = trials.run(arguments.kills // 2)
                print(f"{label}: {tallies[label].kills} kills, {len(tallies[label].wrong)} wrong", flush=True)
        finally:
            warm.close()
    print("\n".join(("", *table(tallies), "")))
    wrong = [w for t in tallies.values() for w in t.wrong]
    print(
        "\n".join(wrong) or f"Nothing was wrong. {time.monotonic() - started:.0f} s, seed {arguments.seed}."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
