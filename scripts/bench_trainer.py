"""Compare the training speed of sftd on one device with transformers (with Liger's kernels on a GPU):

    python scripts/bench_trainer.py speed [--rows 4,8] [--contenders sftd,peer-bf16,peer-fp32master]
    python scripts/bench_trainer.py lengths [--rows 4,8,16] [--median 350] [--sigma 1.0]
    python scripts/bench_trainer.py lora [--contenders sftd-lora,peer-lora] [--rows 1]
    python scripts/bench_trainer.py moe [--contenders sftd,peer-moe] [--rows 8]
    python scripts/bench_trainer.py speed --profile --rows 4
    python scripts/bench_trainer.py speed --shape tiny --device cpu --rows 2

`speed`: full sequences of one length. Contenders:
  sftd                the trainer's own functions: FP32 master weights and gradients in Megatron's distributed optimizer
  sftd-deterministic  the same with `training.deterministic`
  peer-bf16           transformers' Llama + Liger, weights, gradients and AdamW in BF16
  peer-fp32master     transformers' Llama + Liger, FP32 weights under autocast to BF16: the same precision as sftd
`lora`: full sequences, adapters of rank 16 on all linear layers of a frozen model (the shape of Llama-3.1-8B). Contenders:
  sftd-lora, sftd-qlora     `model.lora`, and with `model.quantize`; -recompute, -recompute-some (15 of 32 layers), -selective,
                            -deterministic and -packed (samples of log-normal lengths) have further keys
  peer-lora                 peft on transformers' Llama + Liger, the base in BF16, fused AdamW; -recompute; -bf16: the adapters too
`moe`: full sequences, four layers of Qwen3-30B-A3B's shape (128 experts of 768, 8 a token). Contenders:
  sftd, sftd-deterministic  as above; sftd's first row is profiled
  sftd-packed               samples of log-normal lengths
  peer-moe                  transformers with `experts_implementation="grouped_mm"`, weights and AdamW in BF16
`lengths`: samples of log-normal lengths, padded to the longest of each micro-batch, and packed; sftd only.

Each row of the table is measured in its own process, one after the other, with the same number of tokens per step, warm-up
steps and timed steps. Tokens follow Zipf's law with a fixed seed, and weights are random, so no other files are needed.
Columns: real tokens/s (of the whole timed block, and of the median step), MFU (model FLOPs by the formula of
`sftd.domain.model.flops` over the device's BF16 peak, without padding and recomputation), peak GiB allocated by torch, the
share of real tokens among the computed ones, and the mean loss of the first and the last step. Each row is also printed as a
line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Measures this checkout, whether or not sftd is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from write_random_data import Zipf, draw_lengths  # noqa: E402
from write_random_model import SHAPES, write_config  # noqa: E402

_LORA = {"model.lora.rank": 16}
_RECOMPUTE = {"model.enable_gradient_checkpointing": True}
_QLORA = _LORA | {"model.quantize": "nf4"}
# Contender → keys of its spec.
SFTD: dict[str, dict[str, Any]] = {
    "sftd": {},
    "sftd-deterministic": {"training.deterministic": True},
    "sftd-packed": {"training.use_rmpad": True},
    "sftd-lora": _LORA,
    "sftd-lora-deterministic": _LORA | {"training.deterministic": True},
    "sftd-lora-packed": _LORA | {"training.use_rmpad": True},
    "sftd-lora-selective": _LORA | _RECOMPUTE | {"model.recompute": "selective"},
    "sftd-lora-recompute": _LORA | _RECOMPUTE,
    # As many as leave the rest within 24 GiB.
    "sftd-lora-recompute-some": _LORA | _RECOMPUTE | {"model.recompute_layers": 15},
    "sftd-qlora": _QLORA,
    "sftd-qlora-recompute": _QLORA | _RECOMPUTE,
}
PEERS = ("peer-bf16", "peer-fp32master", "peer-moe", "peer-lora", "peer-lora-bf16", "peer-lora-recompute")
# What each mode compares if it is not told: (contender, rows of a micro-batch).
LORA_JOBS = (
    ("sftd-lora", 1),
    ("peer-lora", 1),
    ("peer-lora-bf16", 1),
    ("sftd-lora-recompute-some", 1),
    ("sftd-lora-recompute", 4),
    ("peer-lora-recompute", 4),
    ("sftd-lora-deterministic", 1),
    ("sftd-lora-packed", 1),
    ("sftd-qlora", 1),
    ("sftd-qlora-recompute", 1),
)
MOE_JOBS = (
    ("sftd", 8),
    ("peer-moe", 8),
    ("sftd", 4),
    ("peer-moe", 4),
    ("sftd-deterministic", 8),
    ("sftd-packed", 8),
)
# Shape → (tokens of a sequence, tokens of a step, median of the length mix, tokens of a packed micro-batch).
SIZES = {
    "llama3.2-1b": (4096, 65536, 350, 16384),
    "llama2-7b": (4096, 65536, 350, 16384),
    "llama3.1-8b": (4096, 16384, 350, 4096),
    "qwen3-moe": (4096, 65536, 350, 16384),
    "tiny": (64, 512, 12, 256),
    "tiny-moe": (64, 512, 12, 256),
}
LEARNING_RATE = 1e-4
PROFILED_STEPS = 2
MARK = "BENCH-RESULT "


@dataclass(frozen=True)
class Job:
    """The measurement of one process. `rows` is the number of samples per micro-batch, `law` the distribution of lengths (see
    write_random_data.py), `budget` the tokens of a packed micro-batch (0 for padding)."""

    contender: str
    shape: str
    device: str
    rows: int
    budget: int
    law: str
    sequence: int
    samples: int
    warmup: int
    steps: int
    profile: bool
    overrides: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The row's name in tables."""
        return self.contender + (f" packed {self.budget}" if self.budget else "")


# ---- in the process of one contender ----


def draw_samples(job: Job) -> list[list[Any]]:
    """Token ids of each sample of each step: one list of int64 [n] per step."""
    import numpy as np

    rng = np.random.default_rng(1)
    zipf = Zipf(SHAPES[job.shape]["vocab_size"])
    steps = job.warmup + job.steps + (PROFILED_STEPS if job.profile else 0)
    found = []
    for _ in range(steps):
        lengths = draw_lengths(rng, job.law, job.samples)
        found.append([zipf.draw(rng, int(n)) for n in lengths])
    return found


# (samples, samples of the next step or None) → (mean loss of the trained tokens, computed tokens with padding).
Step = Callable[[list[Any], list[Any] | None], tuple[float, int]]


def sftd_step(job: Job, folder: str) -> tuple[Step, str]:
    """A step by the trainer's own functions, and the name of its compute dtype."""
    from sftd.trainer.runtime import process

    process.prepare()
    import numpy as np
    import torch

    from sftd.domain.data.rows import IGNORE_INDEX
    from sftd.domain.spec.learning_rate import learning_rate
    from sftd.domain.spec.parse import LEAVES, parse
    from sftd.trainer import trainee as trainees
    from sftd.trainer.data.batches import Batching
    from sftd.trainer.data.rows import Sample
    from sftd.trainer.model import weights
    from sftd.trainer.model.quantize.products import quantized
    from sftd.trainer.runtime import session as sessions
    from sftd.wire.model.folder import read_shape

    overrides: list[tuple[str, Any]] = list(job.overrides)
    if job.budget:
        overrides.append(("training.use_rmpad", True))
        if "training.micro_batch_tokens" in LEAVES:
            overrides.append(("training.micro_batch_tokens", job.budget))
    chosen = {"training.deterministic": False} | SFTD[job.contender]
    overrides[:0] = [(key, value) for key, value in chosen.items() if key in LEAVES]
    config = {
        "model": {"partial_pretrain": folder},
        "data": {
            "train_files": ["random"],
            "train_batch_size": job.samples,
            "sequence_length": job.sequence,
        },
        "training": {"micro_batch_size_per_gpu": job.rows},
        "optimizer": {"lr": LEARNING_RATE, "clip_grad": 1.0},
        "scheduler": {"type": "constant"},
        "trainer": {"max_steps": job.warmup + job.steps},
        "launch": {"device": job.device, "nproc_per_node": 1},
    }
    spec, _ = parse(config, overrides)
    session = sessions.start(spec)
    shape = read_shape(folder, {})
    # The weights are random, below: the folder has none.
    weights.load = lambda *_: None
    trainee = trainees.load(spec, shape, session, pretrained=False)
    generator = torch.Generator(session.device).manual_seed(1)
    with torch.no_grad():
        for chunk in trainee.chunks:
            for parameter in chunk.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                elif stored := quantized(parameter):
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=session.device)
                    stored.fill(values.normal_(0.0, 0.02, generator=generator))
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)
    # The FP32 master copy is of the old weights.
    trainee.optimizer.reload_model_params()
    batching = Batching.of(spec, session)
    done = 0

    prepared: list[Any] | None = None

    class InMemory:
        """Samples instead of `Rows`: every token but a sample's last predicts the next."""

        def __init__(self, samples: list[Any]) -> None:
            self._samples = samples
            self.lengths = np.array([ids.size for ids in samples])

        def __getitem__(self, row: int) -> Sample:
            ids = self._samples[row]
            return Sample(ids, np.append(ids[1:], IGNORE_INDEX))

    def prepare(samples: list[Any]) -> list[Any]:
        return batching.batches(InMemory(samples), np.arange(len(samples)))

    def step(samples: list[Any], upcoming: list[Any] | None) -> tuple[float, int]:
        nonlocal done, prepared
        batches = prepared if prepared is not None else prepare(samples)
        sums, _norm = trainee.step(
            batches,
            divisor=sum(b.trained for b in batches),
            learning_rate=learning_rate(done, spec, job.warmup + job.steps),
        )
        # As in the trainer's loop: prepare the next step's micro-batches while the GPU computes.
        prepared = None if upcoming is None else prepare(upcoming)
        done += 1
        return float(sums[0]), sum(b.tokens.numel() for b in batches)

    return step, str(session.dtype).removeprefix("torch.")


def peer_step(job: Job, folder: str) -> tuple[Step, str]:
    """A step of a plain transformers loop, and the name of the dtype of its matrix products."""
    import numpy as np
    import torch
    import transformers

    options: dict[str, Any] = {}
    if job.contender == "peer-moe":
        options["experts_implementation"] = "grouped_mm"
    elif job.device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
    is_bf16 = job.contender != "peer-fp32master"
    torch.manual_seed(1)
    with torch.device(job.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder),
            dtype=torch.bfloat16 if is_bf16 else torch.float32,
            attn_implementation="sdpa",
            **options,
        )
    if "lora" in job.contender:
        import peft

        if "recompute" in job.contender:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        # By default peft keeps the adapters in FP32.
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype="bf16" not in job.contender)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    cast = contextlib.nullcontext if is_bf16 else lambda: torch.autocast(job.device, torch.bfloat16)

    def step(samples: list[Any], _upcoming: list[Any] | None) -> tuple[float, int]:
        rows = torch.from_numpy(np.stack(samples)).to(job.device).split(job.rows)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for ids in rows:
            with cast():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(rows)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(torch.stack(losses).sum()), sum(ids.numel() for ids in rows)

    return step, "bfloat16"


def measure(job: Job) -> dict[str, Any]:
    """Run the contender and return its measurements. Raises `RuntimeError` if the loss does not fall."""
    import torch

    from sftd.domain.model.flops import peak_flops, training_flops
    from sftd.domain.spec.model_section import Lora, Model
    from sftd.wire.model.folder import read_shape

    is_cuda = job.device == "cuda"
    steps = draw_samples(job)
    with tempfile.TemporaryDirectory() as folder:
        write_config(job.shape, Path(folder))
        shape = read_shape(folder, {})
        build = sftd_step if job.contender in SFTD else peer_step
        step, dtype = build(job, folder)

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    losses = [step(samples, upcoming)[0] for samples, upcoming in pairwise(steps[: job.warmup + 1])]
    computed = 0
    timed = steps[job.warmup : job.warmup + job.steps]
    wait()
    ends = [time.perf_counter()]
    for samples, upcoming in zip(timed, [*timed[1:], None], strict=True):
        loss, padded = step(samples, upcoming)
        losses.append(loss)
        computed += padded
        ends.append(time.perf_counter())
    wait()
    seconds = time.perf_counter() - ends[0]
    tokens = [sum(ids.size for ids in samples) for samples in timed]
    rates = [n / (end - start) for n, start, end in zip(tokens, ends, ends[1:], strict=False)]
    # Of adapters, also the peer's: a frozen matrix has no weight gradient.
    model = Model(lora=Lora(rank=16)) if "lora" in job.contender else Model()
    squares = sum(float(ids.size) ** 2 for s in timed for ids in s)
    flops = training_flops(shape, sum(tokens), squares, model)
    device_name = torch.cuda.get_device_name() if is_cuda else "cpu"
    peak = peak_flops(device_name, dtype)
    found = {
        "contender": job.label,
        "rows": job.rows,
        "tokens_per_second": sum(tokens) / seconds,
        "tokens_per_second_median_step": statistics.median(rates),
        "mfu": flops / seconds / peak if peak else None,
        "tflops": flops / seconds / 1e12,
        "real_share": sum(tokens) / computed,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens_per_step": sum(tokens) / len(tokens),
        "steps": job.steps,
        "seconds": seconds,
        "dtype": dtype,
        "device": device_name,
    }
    if not (math.isfinite(losses[-1]) and losses[-1] < losses[0]):
        raise RuntimeError(f"the loss went from {losses[0]} to {losses[-1]}: it must fall")
    if job.profile:
        found["profile"] = profile(
            lambda: [step(*pair) for pair in pairwise([*steps[-PROFILED_STEPS:], None])], is_cuda, wait
        )
    return found


# ---- where the time goes ----

# The first pattern that matches a kernel's name decides its group.
GROUPS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|matmul|wgmma|splitk|addmm|aten::(mm|bmm)$"),
    ("optimizer", r"multi_tensor|adam|lpnorm|l2norm"),
    ("copies", r"memcpy|memset|aten::copy_"),
    (
        "elementwise",
        r"elementwise|reduce|index|catarray|fill|scatter|gather|sort|scan|norm|softmax|triton_|aten::",
    ),
)


def own_kernels() -> set[str]:
    """Names of the Triton kernels that the trainer defines."""
    found: set[str] = set()
    for path in (ROOT / "sftd" / "trainer").rglob("*.py"):
        found.update(re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", path.read_text()))
    return found


def group_of(kernel: str, own: set[str]) -> str:
    """The group of a kernel."""
    if kernel in own:
        return "own kernels"
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile(work: Callable[[], object], is_cuda: bool, wait: Callable[[], None]) -> dict[str, Any]:
    """Kernels of `work` by time (milliseconds), their groups, and the GPU's idle share. On a CPU: operators by their own time,
    without an idle share."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    wait()
    started = time.perf_counter()
    # Only the GPU's records: recording operators slows the host down, and the GPU would wait for it.
    with record(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as recorded:
        work()
        wait()
    wall = time.perf_counter() - started
    totals: dict[str, list[float]] = {}
    spans: list[tuple[float, float]] = []
    for name, start, duration in kernels(recorded, is_cuda):
        totals.setdefault(name, []).append(duration)
        spans.append((start, start + duration))
    own = own_kernels()
    groups: dict[str, float] = {}
    for name, durations in totals.items():
        group = group_of(name, own)
        groups[group] = groups.get(group, 0.0) + sum(durations) / 1e3
    top = sorted(totals.items(), key=lambda item: -sum(item[1]))[:30]
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "steps": PROFILED_STEPS,
        "wall_ms": wall * 1e3,
        "kernel_ms": sum(groups.values()),
        "idle_share": 1 - union(spans) / span if is_cuda else None,
        "groups_ms": groups,
        "top": [
            {"kernel": n, "group": group_of(n, own), "calls": len(d), "ms": sum(d) / 1e3} for n, d in top
        ],
    }


def kernels(recorded: Any, is_cuda: bool) -> Iterator[tuple[str, float, float]]:
    """(name, start, duration) of every kernel and copy, in microseconds."""
    if not is_cuda:
        for event in recorded.events():
            yield event.name, event.time_range.start, event.self_cpu_time_total
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield event["name"], float(event["ts"]), float(event["dur"])


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def child(text: str) -> None:
    """Entry point of a contender's process. `text` is the job as JSON; prints the result as a marked line."""
    found = measure(Job(**json.loads(text)))
    print(MARK + json.dumps(found), flush=True)
    # Skips the libraries' exit handlers and their messages.
    sys.stdout.flush()
    os._exit(0)


# ---- in the main process ----


def run(job: Job, timeout: float) -> dict[str, Any]:
    """One contender in its own process. A failure is a result with the key `failure`."""
    environment = dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [sys.executable, __file__, "_child", json.dumps(asdict(job))]
    base = {"contender": job.label, "rows": job.rows}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            argv, env=environment, check=False, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return base | {"failure": f"timed out after {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK)) | {"process_seconds": time.perf_counter() - started}
    errors = done.stderr.strip() or done.stdout.strip()
    if "OutOfMemoryError" in errors:
        return base | {"failure": "out of memory"}
    print(f"---- {job.label}, {job.rows} rows, exit code {done.returncode}:\n{errors[-3000:]}\n----")
    # The exception's own line is the last one that is not indented.
    reasons = [line for line in errors.splitlines() if line[:1].strip()]
    return base | {"failure": reasons[-1] if reasons else f"exit code {done.returncode}"}


def free_port() -> int:
    """An unused TCP port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_environment(device: str) -> str:
    """Devices and versions, without starting CUDA here."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        name = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    else:
        name = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "triton", "megatron-core", "transformers", "liger-kernel"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{name}\n{', '.join(versions)}"


def print_row(found: dict[str, Any]) -> None:
    """Print a row of the table."""
    head = f"{found['contender']:22} {found['rows']:4}"
    if "failure" in found:
        print(f"{head}   {found['failure'][:90]}", flush=True)
        return
    mfu = f"{found['mfu']:7.1%}" if found["mfu"] is not None else "      –"
    peak = f"{found['peak_gib']:8.1f}" if found["peak_gib"] is not None else "       –"
    loss = f"{found['first_loss']:7.3f} → {found['last_loss']:.3f}"
    rates = f"{found['tokens_per_second']:10,.0f} {found['tokens_per_second_median_step']:10,.0f}"
    print(f"{head} {rates} {mfu} {peak} {found['real_share']:6.1%}  {loss}", flush=True)


def print_profile(found: dict[str, Any]) -> None:
    """Print the profile of one row."""
    p = found["profile"]
    idle = "" if p["idle_share"] is None else f", GPU idle {p['idle_share']:.1%} of the time"
    print(f"\n{found['contender']}, {found['rows']} rows: {p['steps']} steps in {p['wall_ms']:.0f} ms{idle}")
    for group, ms in sorted(p["groups_ms"].items(), key=lambda item: -item[1]):
        print(f"  {group:12} {ms:10.1f} ms {ms / p['kernel_ms']:6.1%} of the kernels' time")
    for kernel in p["top"]:
        share = kernel["ms"] / p["kernel_ms"]
        print(
            f"  {kernel['ms']:9.2f} ms {share:6.1%} {kernel['calls']:6} × {kernel['group']:12} {kernel['kernel'][:100]}"
        )


def print_ratios(found: list[dict[str, Any]]) -> None:
    """Print the ratios of sftd to each peer, at equal rows and at the best rows of each."""
    good = [f for f in found if "failure" not in f]
    for ours in (c for c in SFTD if any(f["contender"] == c for f in good)):
        for peer in (p for p in PEERS if any(f["contender"] == p for f in good)):
            mine = {f["rows"]: f["tokens_per_second"] for f in good if f["contender"] == ours}
            theirs = {f["rows"]: f["tokens_per_second"] for f in good if f["contender"] == peer}
            parts = [f"{n} rows {mine[n] / theirs[n]:.2f}" for n in sorted(mine.keys() & theirs.keys())]
            parts.append(f"best {max(mine.values()) / max(theirs.values()):.2f}")
            print(f"{ours} / {peer}: {', '.join(parts)}")


def print_packing_ratio(found: list[dict[str, Any]]) -> None:
    """Print the ratios of packed to padded micro-batches."""
    good = [f for f in found if "failure" not in f]
    padded = [f for f in good if "packed" not in f["contender"]]
    for packed in (f for f in good if "packed" in f["contender"]):
        for other in padded:
            ratio = packed["tokens_per_second"] / other["tokens_per_second"]
            is_best = other is max(padded, key=lambda f: f["tokens_per_second"])
            print(
                f"packed / padded in {other['rows']} rows: {ratio:.2f}{' (the best padded one)' if is_best else ''}"
            )


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """The measurements in order: all contenders for each number of rows."""
    sequence, tokens, median, budget = SIZES[arguments.shape]
    sequence, tokens = arguments.sequence or sequence, arguments.tokens or tokens
    base: dict[str, Any] = {
        "shape": arguments.shape,
        "device": arguments.device,
        "sequence": sequence,
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "profile": arguments.profile,
        "overrides": arguments.set,
    }
    if arguments.mode == "speed":
        fixed = base | {"law": f"fixed:{sequence}", "samples": tokens // sequence, "budget": 0}
        contenders = arguments.contenders or ["sftd", *([] if arguments.profile else PEERS[:2])]
        if arguments.deterministic and "sftd-deterministic" not in contenders:
            contenders.insert(1, "sftd-deterministic")
        ours, theirs = arguments.rows or [4, 8], arguments.peer_rows or arguments.rows or [4, 8]
        for rows in sorted({*ours, *theirs}):
            for contender in contenders:
                if rows in (ours if contender in SFTD else theirs):
                    yield Job(contender=contender, rows=rows, **fixed)
        return
    if arguments.mode in ("lora", "moe"):
        todo = LORA_JOBS if arguments.mode == "lora" else MOE_JOBS
        fixed = base | {"law": f"fixed:{sequence}", "samples": tokens // sequence, "budget": 0}
        packed = {"law": f"lognormal:{median}:{sequence}:1.0", "samples": 3 * tokens // (2 * median)}
        for number, (contender, rows) in enumerate(todo):
            if contender in (arguments.contenders or dict(todo)) and rows in (arguments.rows or [rows]):
                more = packed if "packed" in contender else {}
                if arguments.mode == "moe" and number == 0:
                    more = more | {"profile": True}
                yield Job(contender=contender, rows=rows, **fixed | more)
        return
    law = f"lognormal:{arguments.median or median}:{sequence}:{arguments.sigma}"
    mixed = base | {"law": law, "samples": arguments.samples, "contender": "sftd"}
    for rows in arguments.rows or [4, 8, 16]:
        yield Job(rows=rows, budget=0, **mixed)
    # A packed micro-batch has its token budget instead of a number of rows.
    yield Job(rows=min(32, arguments.samples), budget=arguments.budget or budget, **mixed)


def numbers(text: str) -> list[int]:
    """2,4,8 → [2, 4, 8]."""
    return [int(part) for part in text.split(",")]


def assignment(text: str) -> tuple[str, Any]:
    """key=value → (key, value). The value is decoded if it is JSON."""
    key, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        return key, json.loads(value)
    return key, value


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("speed", "lora", "moe", "lengths"):
        part = modes.add_parser(mode)
        default = {"lora": "llama3.1-8b", "moe": "qwen3-moe"}.get(mode, "llama3.2-1b")
        part.add_argument("--shape", choices=SIZES, default=default)
        part.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        part.add_argument("--rows", type=numbers, help="samples of a micro-batch, such as 2,4,8")
        part.add_argument("--sequence", type=int, help="tokens of the longest sample")
        part.add_argument("--tokens", type=int, help="tokens of an optimizer step (speed)")
        part.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
        part.add_argument("--steps", type=int, default=8, help="timed steps")
        part.add_argument("--timeout", type=float, default=180.0, help="seconds for each process")
        part.add_argument("--profile", action="store_true", help="profile the kernels of sftd")
        part.add_argument(
            "--set",
            type=assignment,
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="spec key for sftd",
        )
        part.add_argument("--json", type=Path, help="also write the JSON lines to this file")
        if mode != "lengths":
            part.add_argument(
                "--contenders", type=lambda text: text.split(","), help=", ".join((*SFTD, *PEERS))
            )
        if mode == "speed":
            part.add_argument("--peer-rows", type=numbers, help="as --rows, for the peers")
            part.add_argument("--deterministic", action="store_true", help="add sftd-deterministic")
        if mode == "lengths":
            part.add_argument("--samples", type=int, default=128, help="samples of an optimizer step")
            part.add_argument("--median", type=int, help="median length in tokens")
            part.add_argument("--sigma", type=float, default=1.0, help="sigma of the logarithm of the length")
            part.add_argument("--budget", type=int, help="tokens of a packed micro-batch")
    arguments = parser.parse_args()
    if unknown := set(getattr(arguments, "contenders", None) or ()) - {*SFTD, *PEERS}:
        parser.error(f"no contender {min(unknown)!r}: use {', '.join((*SFTD, *PEERS))}")
    return arguments


def main() -> int:
    """Measure and print. Returns 1 if every measurement failed."""
    if len(sys.argv) == 3 and sys.argv[1] == "_child":
        child(sys.argv[2])
    arguments = parse_arguments()
    todo = list(jobs(arguments))
    print(describe_environment(arguments.device))
    first = todo[0]
    print(
        f"{first.shape}, {first.law.replace(':', ' ')}, {first.samples} samples a step, "
        f"{first.warmup} steps of warm-up, {first.steps} timed\n"
    )
    print(
        f"{'contender':22} {'rows':>4} {'tokens/s':>10} {'median':>10} {'MFU':>7} {'peak GiB':>8} {'real':>6}  loss",
        flush=True,
    )
    found = []
    for job in todo:
        found.append(run(job, arguments.timeout))
        print_row(found[-1])
    print()
    (print_packing_ratio if arguments.mode == "lengths" else print_ratios)(found)
    for result in found:
        if "profile" in result:
            print_profile(result)
    lines = [json.dumps({"mode": arguments.mode, "shape": arguments.shape} | f) for f in found]
    print("\n" + "\n".join(lines))
    if arguments.json:
        arguments.json.write_text("\n".join(lines) + "\n")
    return 0 if any("failure" not in f for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
