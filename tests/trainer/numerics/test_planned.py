"""What a plan says is what the trainer does: its micro-batches.

That it holds as many weights, gradients and moments is shown in test_layouts.py, on ranks that train anyway.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.plan.batch import workload
from sftd.domain.plan.sizes import LENGTH_TILE
from sftd.domain.spec.parse import parse
from sftd.trainer.data.packing import Planner


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
        multiple=LENGTH_TILE,
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
