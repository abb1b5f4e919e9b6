"""Compare a plan's memory with the memory in use, part by part, on one GPU (or a CPU):

    python scripts/measure_plan.py [--shape llama3.2-1b] [--sequence 4096] [--samples 16] [--steps 3] [KEY=VALUE...]
    python scripts/measure_plan.py --shape tiny --sequence 64 --device cpu training.micro_batch_size_per_gpu=4

Random weights and samples of one length; every token but the last is trained. KEY=VALUE are keys of the spec, such as
model.lora.rank=16 or model.enable_gradient_checkpointing=true. Prints the memory in use after each stage (`torch.cuda.memory_allocated`; on a CPU
the process's resident bytes). At the end it prints the peak, the plan, the allocator's reserved memory and the use by
nvidia-smi. The last line is JSON. Numbers are GiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_trainer import assignment  # noqa: E402
from write_random_model import SHAPES, write_config  # noqa: E402

GIB = 2**30


def in_use(device: str) -> float:
    """GiB of tensors on a GPU; of the process on a CPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return float(torch.cuda.memory_allocated()) / GIB
    import psutil

    return float(psutil.Process().memory_info().rss) / GIB


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train some steps. Returns GiB in use after each stage, and the plan's parts."""
    from sftd.trainer.runtime import process

    process.prepare()
    process.use_single_process_defaults()
    import numpy as np
    import torch

    from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
    from sftd.domain.data.rows import IGNORE_INDEX
    from sftd.domain.plan.batch import workload
    from sftd.domain.plan.duration import Machine, step_seconds
    from sftd.domain.plan.memory import footprints, fullest
    from sftd.domain.spec.parse import parse
    from sftd.trainer import trainee as trainees
    from sftd.trainer.data.batches import Batching
    from sftd.trainer.data.rows import Sample
    from sftd.trainer.loop.meter import Meter
    from sftd.trainer.model import model as models
    from sftd.trainer.model import weights
    from sftd.trainer.runtime import session as sessions
    from sftd.wire.model.folder import read_shape

    n, rows, device = arguments.sequence, arguments.samples, arguments.device
    config = {
        "model": {"partial_pretrain": folder},
        "data": {"train_files": ["random"], "train_batch_size": rows, "sequence_length": n},
        "trainer": {"max_steps": arguments.steps},
        "launch": {"device": device, "nproc_per_node": 1},
    }
    spec, _ = parse(config, arguments.keys)
    shape = read_shape(folder, {})
    stages: dict[str, float] = {}

    def watched(module: Any, name: str, stage: str) -> None:
        inner = getattr(module, name)

        def call(*args: Any, **named: Any) -> Any:
            result = inner(*args, **named)
            stages[stage] = in_use(device)
            return result

        setattr(module, name, call)

    # The folder has no weights: a frozen model gets random ones below, as any other.
    setattr(weights, "load", lambda *_: None)  # noqa: B010
    watched(models, "build", "model")
    watched(models, "distribute", "model, gradients")
    session = sessions.start(spec)
    stages["start"] = in_use(device)
    trainee = trainees.load(spec, shape, session, pretrained=False)
    stages["model, gradients, master weights"] = in_use(device)
    with torch.no_grad():
        for parameter in (p for chunk in trainee.chunks for p in chunk.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif hasattr(parameter, "quantized"):
                parameter.quantized.fill(torch.randn(parameter.shape) * 0.02)
            else:
                parameter.normal_(0.0, 0.02)
    trainee.optimizer.reload_model_params()
    ids = np.random.default_rng(1).integers(0, shape.vocab_size, (rows, n))

    class InMemory:
        lengths = np.full(rows, n)

        def __getitem__(self, row: int) -> Sample:
            return Sample(ids[row], np.append(ids[row][1:], IGNORE_INDEX))

    batches = Batching.of(spec, session).batches(InMemory(), np.arange(rows))  # type: ignore[arg-type]
    meter = Meter(shape, spec.model, session)
    seconds = 0.0
    for step in range(arguments.steps):
        in_use(device)
        started = time.perf_counter()
        trainee.step(batches, divisor=sum(b.trained for b in batches), learning_rate=1e-5)
        stages[f"after step {step + 1}"] = in_use(device)
        seconds = time.perf_counter() - started
        stages[f"peak so far, step {step + 1}"] = meter.peak_memory() / GIB
    facts = DataFacts(
        files=[],
        digest="",
        rows=rows,
        tokens=rows * n,
        trained_tokens=rows * (n - 1),
        longest=n,
        truncated=0,
        unusable=0,
        seen_tokens=rows * n,
        seen_squares=rows * n * n,
        lengths=(n,) * len(LENGTH_QUANTILES),
    )
    work = workload(spec, facts, arguments.steps, device)
    dtype = str(session.dtype).removeprefix("torch.")
    planned = fullest(footprints(spec, shape, work, device=device, dtype=dtype))
    found: dict[str, Any] = {"stages": stages, "peak": meter.peak_memory() / GIB}
    found["planned"] = {name: getattr(planned, name) / GIB for name in planned.__struct_fields__[1:]}
    found["planned"]["total"] = planned.total / GIB
    if device == "cuda":
        found["reserved"] = torch.cuda.max_memory_reserved() / GIB
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        text = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        found["nvidia_smi_used"] = float(text.splitlines()[session.device.index or 0]) / 1024
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    machine = Machine(device=device, name=name, cores=torch.get_num_threads())
    found["last_step_seconds"] = seconds
    found["planned_seconds"] = step_seconds(spec, shape, work, machine)[0]
    found["error"] = found["planned"]["total"] / found["peak"] - 1
    sessions.close()
    return found


def main() -> None:
    """Measure one config."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", type=assignment, metavar="KEY=VALUE", help="spec keys")
    parser.add_argument("--shape", choices=SHAPES, default="llama3.2-1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=16, help="samples of a step")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_config(arguments.shape, Path(folder))
        found = measure(arguments, folder)
    for name, value in (
        *found["stages"].items(),
        *(("planned: " + k, v) for k, v in found["planned"].items()),
    ):
        print(f"{name:36} {value:9.3f}")
    print(f"peak {found['peak']:.3f}, planned {found['planned']['total']:.3f}: {found['error']:+.1%}")
    print(f"last step {found['last_step_seconds']:.3f} s, planned {found['planned_seconds']:.3f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
