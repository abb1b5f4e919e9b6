"""The loss of optimizer.precision lean beside that of full: the same samples in the same order, BF16 weights in both.

    python scripts/bench_lean.py --model FOLDER --train FILE --val FILE [--steps 200] [--out FOLDER] [KEY=VALUE...]

Trains both without a daemon, one after the other, in OUT. KEY=VALUE are keys of the spec, such as launch.device=cpu. Prints the
mean loss of each 20 steps, the validation losses, the size of a checkpoint and, on a GPU, the peak memory. A run that is
complete in OUT is not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from sftd.domain.log.events import (  # noqa: E402
    CheckpointPublished,
    Event,
    StepCompleted,
    ValidationCompleted,
)
from sftd.wire.attempt import journal  # noqa: E402

WINDOW = 20
MIB = 2**20


def train(arguments: argparse.Namespace, precision: str) -> list[Event]:
    """Events of a run with `precision`."""
    keys = [
        f"model.partial_pretrain={arguments.model}",
        f"data.train_files=[{arguments.train}]",
        f"data.val_files=[{arguments.val}]",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.val_check_interval={arguments.steps // 4}",
        "trainer.save_interval=0",
        "data.train_batch_size=4",
        "data.sequence_length=128",
        "training.micro_batch_size_per_gpu=4",
        "model.megatron.params_dtype=bfloat16",
        # As `sftd demo` trains.
        "optimizer.lr=1e-4",
        "optimizer.weight_decay=0.0",
        "scheduler.warmup_steps=3",
        "scheduler.min_lr_ratio=0.1",
        *arguments.keys,
        f"optimizer.precision={precision}",
        f"trainer.experiment_name={precision}",
        f"checkpoint.save_dir={arguments.out}",
    ]
    subprocess.run([sys.executable, "-m", "sftd.trainer", *keys], cwd=ROOT, check=True)
    paths = (Path(arguments.out) / precision).rglob("journal")
    return [line.event for path in sorted(paths) for line in journal.read(path)[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "train", "val"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="lean-out")
    parser.add_argument("keys", nargs="*")
    arguments = parser.parse_args()
    events = {precision: train(arguments, precision) for precision in ("full", "lean")}
    steps = {name: [e for e in found if isinstance(e, StepCompleted)] for name, found in events.items()}
    losses = {name: [e.loss for e in found] for name, found in steps.items()}
    print("| steps | full | lean | difference |\n|---|---|---|---|")
    for first in range(0, arguments.steps, WINDOW):
        part = [fmean(losses[name][first : first + WINDOW]) for name in ("full", "lean")]
        last = min(first + WINDOW, arguments.steps)
        print(f"| {first + 1} to {last} | {part[0]:.4f} | {part[1]:.4f} | {part[1] / part[0] - 1:+.3%} |")
    checks = {
        name: {e.step: e.loss for e in found if isinstance(e, ValidationCompleted)}
        for name, found in events.items()
    }
    for step, loss in checks["full"].items():
        other = checks["lean"][step]
        print(f"| validation after {step} | {loss:.4f} | {other:.4f} | {other / loss - 1:+.3%} |")
    largest = max(abs(b / a - 1) for a, b in zip(*losses.values(), strict=True))
    print(f"largest difference of a step: {largest:.3%}")
    for name, found in events.items():
        size = max(e.bytes for e in found if isinstance(e, CheckpointPublished)) / MIB
        peak = max((e.peak_memory_bytes or 0) / MIB for e in steps[name])
        seconds = median(e.seconds for e in steps[name])
        print(f"{name}: checkpoint {size:,.0f} MiB, peak {peak:,.0f} MiB, {seconds:.3f} s a step")


if __name__ == "__main__":
    main()
