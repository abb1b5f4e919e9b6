"""Measure checkpoints: synchronous and asynchronous saves, loading, and the cost of deterministic steps.

    python scripts/bench_checkpoint.py [--shape llama3.2-1b] [--device cuda] [--folder DIR]
    python scripts/bench_checkpoint.py --shape smollm2-135m --device cpu
    torchrun --nproc-per-node=2 scripts/bench_checkpoint.py --shape smollm2-135m --device cpu

Random weights and tokens, the trainer's own functions, and one process for all, so that the ratios are comparable:
  sync save       from the start to the publication; training waits all the time
  async, blocking the time that training waits at the start (planning, copying to host memory) and at the publication
  async, stall    the same, plus the slowdown of the steps while the save is written
  load            verifying every file's sha256, and reading
  host memory     the peak of this process's resident memory above that of training, per rank
Each save is measured twice; the first asynchronous save also allocates and page-locks the memory of the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from write_random_model import write_config  # noqa: E402

# Shape → (tokens of a sequence, sequences of a step, of a micro-batch).
SIZES = {
    "llama3.2-1b": (4096, 16, 4),
    "llama2-7b": (2048, 16, 4),
    "smollm2-135m": (64, 4, 2),
    "tiny": (32, 4, 2),
}


class Memory:
    """Resident memory of this process, in bytes."""

    def __init__(self) -> None:
        # Resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def grown(self) -> int:
        """Peak since the start, minus the value at the start."""
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Bench:
    """One rank of the trainer, with a checkpoint folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from sftd.trainer.runtime import process

        process.prepare()
        process.use_single_process_defaults()
        import numpy as np
        import torch

        from sftd.domain.data.rows import IGNORE_INDEX
        from sftd.domain.spec.parse import parse
        from sftd.trainer import trainee as trainees
        from sftd.trainer.data.batches import Batching
        from sftd.trainer.data.rows import Sample
        from sftd.trainer.runtime import session as sessions
        from sftd.wire.model.folder import read_shape

        self.ranks = int(os.environ["WORLD_SIZE"])
        self.rank = int(os.environ["RANK"])
        length, samples, rows = SIZES[arguments.shape]
        with tempfile.TemporaryDirectory() as model:
            write_config(arguments.shape, Path(model))
            config = {
                "model": {"partial_pretrain": model},
                "data": {
                    "train_files": ["random"],
                    "train_batch_size": samples,
                    "sequence_length": length,
                },
                "training": {"micro_batch_size_per_gpu": rows},
                "launch": {"device": arguments.device, "nproc_per_node": self.ranks},
            }
            self.spec, _ = parse(config, [tuple(pair.split("=", 1)) for pair in arguments.set])
            self.session = sessions.start(self.spec)
            shape = read_shape(model, {})
        self.trainee = trainees.load(self.spec, shape, self.session, pretrained=False)
        generator = torch.Generator(self.session.device).manual_seed(1)
        with torch.no_grad():
            for parameter in (p for chunk in self.trainee.chunks for p in chunk.parameters()):
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)
        # The FP32 master copy is of the old weights.
        self.trainee.optimizer.reload_model_params()
        tokens = np.random.default_rng(1).integers(3, shape.vocab_size, (samples, length))

        class Rows:
            """Samples instead of the trainer's rows: every token but the last predicts the next."""

            lengths = np.full(samples, length)

            def __getitem__(self, row: int) -> Sample:
                return Sample(tokens[row], np.append(tokens[row][1:], IGNORE_INDEX))

        self._batches = Batching.of(self.spec, self.session).batches(Rows(), np.arange(samples))
        self._trained = samples * (length - 1)
        self.events: list[Any] = []
        self._folder = folder
        self._step = 0
        from sftd.trainer.checkpoint.checkpoints import Checkpoints

        bench = self

        class Reporter:
            """Collects events instead of writing a journal."""

            def emit(self, event: Any) -> None:
                bench.events.append(event)

            def flush(self) -> None:
                pass

            def check_fence(self) -> None:
                pass

        self._reporter: Any = Reporter()
        self.checkpoints = Checkpoints(self._order(None), self.session, self.trainee, self._reporter)

    def _order(self, checkpoint: str | None) -> Any:
        from sftd.wire.attempt.directory import Order

        fields = {"spec": self.spec, "planned_steps": 1, "checkpoint_dir": str(self._folder)}
        return Order(run_id="bench", attempt=1, token="", checkpoint=checkpoint, **fields)

    def step(self) -> tuple[float, bool]:
        """Run one optimizer step. Returns its seconds, and whether every rank has written its share of the current save."""
        import torch
        import torch.distributed as dist

        started = time.perf_counter()
        sums, _ = self.trainee.step(self._batches, divisor=self._trained, learning_rate=1e-5)
        vector = torch.stack([sums[0], sums.new_tensor(self.checkpoints.is_written)])
        dist.all_reduce(vector)
        is_written = float(vector[1]) == self.ranks
        self._step += 1
        return time.perf_counter() - started, is_written

    def save(self, *, is_async: bool, plain: float) -> dict[str, float]:
        """Save once. Returns the measurements."""
        from sftd.domain.log.events import AnomalyDetected
        from sftd.trainer.checkpoint.checkpoints import Progress

        # The step must differ from that of the last checkpoint.
        self.step()
        progress = Progress(self._step, 0, 1.0, 1.0)
        memory, started = Memory(), time.perf_counter()
        if not is_async:
            self.checkpoints.save(progress, {}, must_succeed=True)
            found = {"seconds": time.perf_counter() - started}
        else:
            self.checkpoints.begin(progress, {})
            blocking, slower, steps, is_written = time.perf_counter() - started, 0.0, 0, False
            while not is_written:
                seconds, is_written = self.step()
                slower += seconds - plain
                steps += 1
            finishing = time.perf_counter()
            self.checkpoints.finish()
            blocking += time.perf_counter() - finishing
            found = {
                "seconds": time.perf_counter() - started,
                "blocking": blocking,
                "stall": blocking + slower,
                "steps": steps,
            }
        assert not [e for e in self.events if isinstance(e, AnomalyDetected)], self.events
        return found | {"memory": memory.grown()}

    def load(self) -> tuple[float, int]:
        """Load the newest checkpoint. Returns seconds, and the growth of the memory in bytes."""
        from sftd.trainer.checkpoint import loading as checkpoint_loading

        order = self._order(str(max(self._folder.glob("step-*"))))
        memory, started = Memory(), time.perf_counter()
        checkpoint_loading.load(order, self.session, self.trainee, self._reporter)
        return time.perf_counter() - started, memory.grown()

    def keep_newest(self) -> None:
        """Delete all checkpoints but the newest."""
        import torch.distributed as dist

        dist.barrier()
        if self.rank == 0:
            for old in sorted(self._folder.glob("step-*"))[:-1]:
                shutil.rmtree(old)

    def bytes(self) -> int:
        """Size of the newest checkpoint."""
        newest = max(self._folder.glob("step-*"))
        return sum(f.stat().st_size for f in newest.iterdir())


def median_step(bench: Bench, steps: int) -> float:
    """Seconds of the median step."""
    return statistics.median(bench.step()[0] for _ in range(steps))


def deterministic_cost(bench: Bench, steps: int) -> float:
    """Relative slowdown of deterministic steps, from alternating blocks in this process."""
    import torch

    was = torch.are_deterministic_algorithms_enabled()
    found: dict[bool, list[float]] = {True: [], False: []}
    for is_on in (False, True, False, True):
        torch.use_deterministic_algorithms(is_on)
        bench.step()
        found[is_on] += [bench.step()[0] for _ in range(steps)]
    torch.use_deterministic_algorithms(was)
    return statistics.median(found[True]) / statistics.median(found[False]) - 1


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all measurements on this rank."""
    bench = Bench(arguments, folder)
    bench.step()
    plain = median_step(bench, arguments.steps)
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "device": arguments.device,
        "ranks": bench.ranks,
        "step": plain,
        "deterministic": deterministic_cost(bench, arguments.steps),
    }
    plain = median_step(bench, arguments.steps)
    for is_async in (False, True):
        rounds = []
        for _ in range(2):
            rounds.append(bench.save(is_async=is_async, plain=plain))
            bench.keep_newest()
        result["async" if is_async else "sync"] = rounds
    result["bytes"] = bench.bytes()
    result["load"], result["load_memory"] = bench.load()
    from sftd.trainer.runtime import session as sessions
    from sftd.trainer.runtime.session import gather

    for key, pick in (
        ("sync_memory", max(r["memory"] for r in result["sync"])),
        ("async_memory", max(r["memory"] for r in result["async"])),
        ("load_memory", result["load_memory"]),
    ):
        result[key] = gather(pick)
    result["rank"] = bench.rank
    sessions.close()
    return result


def report(r: dict[str, Any]) -> None:
    """Print the measurements and their ratios."""
    sync, (first, later) = r["sync"][-1]["seconds"], r["async"]
    gb = r["bytes"] / 1e9
    rows: list[tuple[str, str]] = [
        ("checkpoint", f"{gb:.3f} GB"),
        ("step", f"{r['step']:.3f} s"),
        ("deterministic against not", f"{r['deterministic']:+.1%}"),
        ("sync save", f"{sync:.2f} s, {gb / sync:.2f} GB/s"),
        ("async save, to its publication", f"{later['seconds']:.2f} s, {later['steps']} steps"),
        ("async, blocking", f"{later['blocking']:.3f} s, {later['blocking'] / sync:.1%} of the sync save"),
        ("async, stall", f"{later['stall']:.3f} s, {later['stall'] / sync:.1%} of the sync save"),
        ("async, blocking, first time", f"{first['blocking']:.3f} s, {first['blocking'] / sync:.1%}"),
        ("load", f"{r['load']:.2f} s, {gb / r['load']:.2f} GB/s"),
    ]
    for name in ("sync", "async", "load"):
        per_rank = ", ".join(f"{m / 1e9:.2f}" for m in r[f"{name}_memory"])
        rows.append((f"host memory, {name}", f"{per_rank} GB"))
    for name, value in rows:
        print(f"{name:32} {value}")
    print(json.dumps({k: v for k, v in r.items() if k != "rank"}))


def main() -> None:
    """Measure and, on rank 0, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SIZES, default="llama3.2-1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder for checkpoints, on the disk to measure (default: a temporary one)",
    )
    parser.add_argument("--steps", type=int, default=4, help="steps of each timed block")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="spec key")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.gettempdir())
    # All ranks of one torchrun need the same name.
    folder = base / f"sftd-bench-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    try:
        result = measure(arguments, folder)
        if os.environ.get("RANK", "0") == "0":
            report(result)
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
