"""What a plan says is what the trainer does: its micro-batches, the chunks of its logits, the bytes of its checkpoints.

That it holds as many weights, gradients and moments is shown in test_layouts.py, on ranks that train anyway.
"""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from sftd import trainer
from sftd.domain.model.checks import LENGTH_QUANTILES, DataFacts
from sftd.domain.plan import disk as storage
from sftd.domain.plan.batch import GPU_TILE, workload
from sftd.domain.plan.memory import CUBLAS_BYTES, LOGITS_BYTES, LOGITS_MULTIPLE, SCORES_BYTES, logits_chunk
from sftd.domain.spec.parse import parse
from sftd.trainer.data.packing import Planner
from sftd.trainer.runtime import process


def defined(module: str, *names: str) -> list[Any]:
    """Constants and functions of a trainer module, by its own source: importing Megatron takes half a minute here."""
    source = Path(trainer.__file__).parent.joinpath(f"{module}.py").read_text()
    wanted = [
        node
        for node in ast.parse(source).body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names)
    ]
    space: dict[str, Any] = {"torch": SimpleNamespace(float32="float32", bfloat16="bfloat16")}
    exec(compile(ast.Module(wanted, []), module, "exec"), space)
    return [space[name] for name in names]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 8190, 8320, 8321, 16380, 100_000])
@pytest.mark.parametrize("row_bytes", [2 * 128_256, 2 * 32_000, 4 * 49_152])
def test_chunks_of_logits_are_those_of_the_loss(rows: int, row_bytes: int) -> None:
    chunks, *_ = defined("model/loss", "_chunks", "_CHUNK_BYTES", "_CHUNK_MULTIPLE")
    found = chunks(rows, row_bytes)
    assert logits_chunk(rows, row_bytes) == (max(c.stop - c.start for c in found), len(found))


def test_constants_are_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert defined("model/loss", "_CHUNK_BYTES", "_CHUNK_MULTIPLE") == [LOGITS_BYTES, LOGITS_MULTIPLE]
    assert defined("model/kernels/exact_attention", "SCORES_BYTES") == [SCORES_BYTES]
    assert defined("data/batches", "_TILE") == [GPU_TILE]
    assert defined("trainee", "_STATE_BYTES") == [storage._STATE_BYTES]
    assert defined("checkpoint/checkpoints", "_HEADROOM") == [storage._HEADROOM]
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    process.set_cuda_defaults()
    kib, count = os.environ["CUBLAS_WORKSPACE_CONFIG"].strip(":").split(":")
    assert int(kib) * 1024 * int(count) == CUBLAS_BYTES


def facts(lengths: Any) -> DataFacts:
    """As `dataset.inspect` would find rows of these lengths, of which all but the first token are trained."""
    return DataFacts(
        files=["t"],
        digest="",
        rows=lengths.size,
        tokens=int(lengths.sum()),
        trained_tokens=int((lengths - 1).sum()),
        longest=int(lengths.max()),
        truncated=0,
        unusable=0,
        seen_tokens=int(lengths.sum()),
        seen_squares=int((lengths.astype(np.int64) ** 2).sum()),
        lengths=tuple(np.quantile(lengths, LENGTH_QUANTILES).round().astype(int).tolist()),
    )


@pytest.mark.parametrize(
    "given",
    [
        {"training.use_rmpad": True, "training.micro_batch_tokens": 4096},
        {"training.use_rmpad": True, "training.micro_batch_tokens": 16384},
        {
            "training.use_rmpad": True,
            "training.micro_batch_tokens": 4096,
            "launch.nproc_per_node": 4,
        },
        {"training.micro_batch_size_per_gpu": 4},
        {"training.micro_batch_size_per_gpu": 16, "launch.nproc_per_node": 2},
    ],
    ids=["packed", "one piece", "packed, DP4", "padded", "padded, DP2"],
)
def test_the_workload_is_that_of_the_planner(given: dict[str, Any]) -> None:
    steps, batch = 200, 64
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(math.log(150), 0.8, 20_000).astype(np.int64), 2, 2048)
    base = {
        "model": {"partial_pretrain": "m"},
        "data": {"train_files": ["t"], "train_batch_size": batch, "sequence_length": 2048},
        "trainer": {"max_steps": steps},
    }
    spec, _ = parse(base, list(given.items()))
    planner = Planner(
        size=spec.training.micro_batch_size_per_gpu,
        tokens=spec.micro_batch_tokens,
        packed=spec.training.use_rmpad,
        one_length=False,
        multiple=GPU_TILE,
        unit=spec.data_parallel_size,
    )
    rows = 1 if spec.training.use_rmpad else spec.training.micro_batch_size_per_gpu
    most = counted = computed = 0
    for _ in range(steps):
        members, sizes = planner.plan(rng.choice(lengths, batch))
        most = max(most, rows * int(sizes.max()))
        counted += len(members) / spec.data_parallel_size / steps
        computed += rows * int(sizes.sum()) / steps
    found = workload(spec, facts(lengths), steps, "cuda")
    assert found.largest == pytest.approx(most, rel=0.05)
    assert found.micro_batches == pytest.approx(counted, abs=0.75)
    assert found.computed == pytest.approx(computed, rel=0.08)
    assert found.real == pytest.approx(batch * lengths.mean(), rel=1e-9)


def test_facts_survive_the_log() -> None:
    # Old logs have fewer of them.
    whole = facts(np.array([4, 5, 6]))
    assert msgspec.convert(msgspec.to_builtins(whole), DataFacts) == whole
