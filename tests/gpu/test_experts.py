"""Experts computed together on a GPU: against one by one on a CPU, and bit for bit the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders.paths import RANKS, ROOT
from tests.builders.trainer.resumes import exact
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from pathlib import Path

    from tests.builders.trainer.trainers import Run, Trainer

pytestmark = pytest.mark.gpu

FP32: dict[str, Any] = {MEGATRON + "params_dtype": "float32"}
EXACT: dict[str, Any] = {"training__micro_batch_size_per_gpu": 4, "training__deterministic": True}
LORA: dict[str, Any] = {"model__lora__rank": 4, "optimizer__lr": 1e-2}
SELECTIVE: dict[str, Any] = {"model__enable_gradient_checkpointing": True, "model__recompute": "selective"}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": FP32,
    "fp32-lora": FP32 | LORA,
    "fp32-qlora": FP32 | LORA | {"model__quantize": "nf4", "model__lora__targets": ["q", "v"]},
    "exact": EXACT,
    "again": EXACT,
    "selective": EXACT | SELECTIVE,
    "exact-lora": EXACT | LORA,
    "again-lora": EXACT | LORA,
}


@pytest.fixture(scope="module")
def of_experts(models: Path) -> dict[str, dict[str, Any]]:
    """Overrides of each of `RUNS`. NF4 needs columns in blocks of 64."""
    names = {name: "mixtral" if "qlora" in name else "qwen3_moe" for name in RUNS}
    return {
        name: given | {"model__partial_pretrain": str(models / names[name]), "trainer__save_interval": 0}
        for name, given in RUNS.items()
    }


@pytest.fixture(scope="module")
def runs(on_gpu: Trainer, of_experts: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """The runs, in one process."""
    return train(on_gpu, of_experts)


@pytest.fixture(scope="module")
def on_the_cpu(on_cpu: Trainer, of_experts: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """Those in FP32, one by one on the CPU."""
    return train(on_cpu, {name: given for name, given in of_experts.items() if name.startswith("fp32")})


def train(trainer: Trainer, runs: dict[str, dict[str, Any]]) -> dict[str, Run]:
    attempts = {
        name: trainer.prepare(f"experts-{name}", trainer.spec(1, **given)) for name, given in runs.items()
    }
    return trainer.together(attempts, RANKS / "together_ranks.py")


def test_experts_computed_together_are_right_and_the_same_again(gpus: int) -> None:
    script = RANKS / "grouped_experts.py"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    run = subprocess.run(
        [sys.executable, str(script), "cuda"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["fp32", "fp32-lora", "fp32-qlora"])
def test_fp32_agrees_with_one_by_one_on_the_cpu(
    runs: dict[str, Run], on_the_cpu: dict[str, Run], name: str
) -> None:
    for step, event in on_the_cpu[name].steps().items():
        assert runs[name].steps()[step].loss == pytest.approx(event.loss, rel=1e-4)
        assert runs[name].steps()[step].grad_norm == pytest.approx(event.grad_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "other"), [("exact", "again"), ("exact", "selective"), ("exact-lora", "again-lora")]
)
def test_half_precision_repeats_its_bits(runs: dict[str, Run], name: str, other: str) -> None:
    assert exact(runs[name]) == exact(runs[other])
