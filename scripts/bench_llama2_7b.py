"""Benchmark the LLaMA-2-7B example on this machine's GPUs: speed of layouts, checkpoints, and a resume in another layout.

    python scripts/bench_llama2_7b.py --ranks 8 --folder DIR [--steps 8] [--cases NAME,…]
    python scripts/bench_llama2_7b.py --ranks 8 --folder DIR --shape tiny-deep --device cpu

Each case runs `scripts/run_llama2_7b_megatron.sh` with random weights of the model's shape and full sequences of random
tokens: global batch 64, distributed optimizer, gradient checkpointing, packed. The numbers are from the runs' events:
tokens/s and MFU of the median step (without the first two), the largest tensor memory of a rank, and seconds and GB/s of a
save. `resume-tp2` resumes the first case's checkpoint in another layout and measures the load. The losses are only printed:
check that they are finite and continue to fall. DIR needs 13.5 GB for the weights, and about 95 GB for the checkpoint of
each case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from sftd.domain.log import events as e  # noqa: E402
from sftd.wire.attempt import journal  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402

_WARMUP = 2
# Additional steps of a resumed run.
_MORE = 4
_GIB = 2**30


class Case(NamedTuple):
    """One launch. `resumes` names the case whose run it resumes."""

    name: str
    layout: dict[str, int]
    sequence: int
    resumes: str = ""

    def keys(self, ranks: int) -> list[str]:
        """The layout as `key=value`. The remaining factor of the ranks is data parallel."""
        sizes = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 0} | self.layout
        if ranks % (sizes["tensor"] * sizes["pipeline"]):
            sys.exit(f"{self.name}: {ranks} ranks do not divide by {self.layout}")
        return [
            f"model.megatron.{name}_model_parallel_size={size or 'null'}" for name, size in sizes.items()
        ] + [f"model.megatron.sequence_parallel={str(sizes['tensor'] > 1).lower()}"]


def cases(sequence: int) -> list[Case]:
    """TP4 × PP2 and TP2 × PP2 × VPP2 × DP2, each with two lengths, and a resume of TP4 × PP2 as TP2 × DP4."""
    tp4pp2, interleaved = {"tensor": 4, "pipeline": 2}, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}
    return [
        Case("tp4-pp2", tp4pp2, sequence),
        Case("resume-tp2", {"tensor": 2}, sequence, resumes="tp4-pp2"),
        Case("tp2-pp2-vpp2", interleaved, sequence),
        Case("tp4-pp2-long", tp4pp2, 2 * sequence),
        Case("tp2-pp2-vpp2-long", interleaved, 2 * sequence),
    ]


def write_inputs(folder: Path, shape: str, sequence: int) -> dict[str, str]:
    """Write random weights, and rows of `sequence` and twice as many tokens. Returns the environment that names the model."""
    model = folder / "model"
    if not (model / "config.json").exists():
        run_tool("write_random_model.py", shape, str(model))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    for length in (sequence, 2 * sequence):
        data = folder / f"data-{length}"
        if not (data / "train.parquet").exists():
            run_tool(
                "write_random_data.py",
                *(str(data), "--rows", "2000", "--vocab", str(vocabulary), "--length", f"fixed:{length}"),
            )
    return {"MODEL": str(model)}


def run_tool(script: str, *arguments: str) -> None:
    """Run one of the scripts beside this one."""
    started = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "scripts" / script), *arguments], check=True)
    print(f"{script} {' '.join(arguments)}: {time.monotonic() - started:.0f} s", flush=True)


def launch(case: Case, options: argparse.Namespace, environment: dict[str, str]) -> AttemptDir | None:
    """Run a case to its end. Returns the attempt's folder, or None after a failure, which is printed."""
    folder, run = options.folder / "runs", case.resumes or case.name
    steps = options.steps + (_MORE if case.resumes else 0)
    argv = [
        str(ROOT / "scripts" / "run_llama2_7b_megatron.sh"),
        str(options.ranks),
        str(folder),
        f"trainer.experiment_name={run}",
        f"trainer.max_steps={steps}",
        # With another schedule, a resume with more steps would change the learning rates.
        "scheduler.type=constant",
        "scheduler.warmup_ratio=0",
        "data.train_batch_size=64",
        f"data.sequence_length={case.sequence}",
        f"training.micro_batch_size_per_gpu={options.rows if case.sequence == options.sequence else max(1, options.rows // 2)}",
        f"launch.device={options.device}",
        *case.keys(options.ranks),
        *options.key,
    ]
    print("$ " + " ".join(argv[:3] + [a for a in argv[3:] if "=" in a]), flush=True)
    data = options.folder / f"data-{case.sequence}" / "train.parquet"
    log = options.folder / f"{case.name}.log"
    with open(log, "w") as stream:
        code = subprocess.run(
            argv,
            check=False,
            env=os.environ | environment | {"TRAIN_FILES": str(data)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        print(
            f"{case.name}: exit code {code}; the end of {log}:", *log.read_text().splitlines()[-25:], sep="\n"
        )
        return None
    return AttemptDir(folder / run / f"attempt-{2 if case.resumes else 1:04d}")


def report(case: Case, attempt: AttemptDir, ranks: int) -> dict[str, object]:
    """The measurements in the attempt's journal."""
    lines, _ = journal.read(attempt.journal, limit=10**6)
    steps = [line.event for line in lines if isinstance(line.event, e.StepCompleted)]
    timed = steps[_WARMUP:] or steps
    middle = statistics.median(s.tokens_real / s.seconds for s in timed)
    shares = [s.mfu for s in timed if s.mfu is not None]
    saved = [line.event for line in lines if isinstance(line.event, e.CheckpointPublished)]
    loaded = [line.event for line in lines if isinstance(line.event, e.ModelLoaded)]
    return {
        "case": case.name,
        "sequence": case.sequence,
        "steps": f"{steps[0].step} to {steps[-1].step}",
        "tokens/s/rank": round(middle / ranks, 1),
        "mfu": round(statistics.median(shares), 4) if shares else None,
        "peak GiB": round(max(s.peak_memory_bytes or 0 for s in steps) / _GIB, 1),
        "save s": round(saved[-1].seconds, 1) if saved else None,
        "save GB/s": round(saved[-1].bytes / saved[-1].seconds / 1e9, 2) if saved else None,
        "load s": round(loaded[-1].seconds, 1) if loaded else None,
        "loss": [round(steps[0].loss, 4), round(steps[-1].loss, 4)],
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield the result of every requested case. Deletes the files of a run after the last case that needs them."""
    environment = write_inputs(options.folder, options.shape, options.sequence)
    wanted = [c for c in cases(options.sequence) if not options.cases or c.name in options.cases]
    for number, case in enumerate(wanted):
        attempt = launch(case, options, environment)
        if attempt is not None:
            yield report(case, attempt, options.ranks)
        run = case.resumes or case.name
        if all(later.resumes != run for later in wanted[number + 1 :]):
            shutil.rmtree(options.folder / "runs" / run, ignore_errors=True)


def main() -> int:
    """Measure, print a line of JSON for each case, and a table. Returns 1 when a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True, help="for weights, data, runs and logs")
    parser.add_argument("--shape", default="llama2-7b", help="a shape of write_random_model.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--sequence", type=int, help="tokens of a sequence; the long cases have twice as many"
    )
    parser.add_argument(
        "--rows", type=int, default=4, help="sequences of a micro-batch; half in the long cases"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", type=lambda text: text.split(","), help="only these")
    parser.add_argument("key", nargs="*", help="key=value for every case")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.sequence = options.sequence or (32 if options.shape.startswith("tiny") else 2048)
    done = []
    for row in measure(options):
        done.append(row)
        print(json.dumps(row), flush=True)
    if done:
        print("\n| " + " | ".join(done[0]) + " |\n|" + "---|" * len(done[0]))
        for row in done:
            print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |")
    wanted = len(options.cases) if options.cases else len(cases(options.sequence))
    return 0 if len(done) == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
