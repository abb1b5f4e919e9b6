"""The trainer on GPUs: the numbers of the CPU, BF16, packed samples, and exact resume."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.events import CheckpointPublished, ModelLoaded

if TYPE_CHECKING:
    from tests.trainer.conftest import Run, Trainer

pytestmark = pytest.mark.gpu

FP32: dict[str, Any] = {"model__megatron__params_dtype": "float32"}


def losses(run: Run) -> list[float]:
    return [step.loss for step in run.steps().values()]


def exact(run: Run) -> dict[int, tuple[float, float, str]]:
    return {n: (s.loss, s.grad_norm, s.samples_digest) for n, s in run.steps().items()}


def test_kernels_compute_what_pytorch_does(gpus: int) -> None:
    script = Path(__file__).parents[1] / "trainer/kernels_interpreted.py"
    run = subprocess.run([sys.executable, str(script), "cuda"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_fp32_agrees_with_the_cpu(on_gpu: Trainer, on_cpu: Trainer, packed: bool) -> None:
    options = FP32 | ({"training__use_rmpad": True} if packed else {})
    name = "fp32-packed" if packed else "fp32"
    gpu, cpu = on_gpu.run(name, **options), on_cpu.run(name, **options)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-4)
    assert gpu.events(ModelLoaded)[0].dtype == "float32"


def test_bf16_trains_padded_and_packed_alike(on_gpu: Trainer) -> None:
    padded = on_gpu.run("bf16", training__micro_batch_size_per_gpu=4)
    packed = on_gpu.run("bf16-packed", training__micro_batch_size_per_gpu=4, training__use_rmpad=True)
    assert padded.events(ModelLoaded)[0].dtype == "bfloat16"
    assert all(map(math.isfinite, losses(padded)))
    assert losses(packed) == pytest.approx(losses(padded), rel=2e-2)


def test_recomputing_changes_no_bit(on_gpu: Trainer) -> None:
    options = {"training__micro_batch_size_per_gpu": 4, "training__deterministic": True}
    kept = on_gpu.run("deterministic-False", training__use_rmpad=False, **options)
    for recompute in ("full", "selective"):
        run = on_gpu.run(
            f"recompute-{recompute}",
            model__enable_gradient_checkpointing=True,
            model__recompute=recompute,
            **options,
        )
        assert exact(run) == exact(kept)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_resume_is_bit_for_bit(on_gpu: Trainer, packed: bool) -> None:
    options = {
        "training__micro_batch_size_per_gpu": 4,
        "training__use_rmpad": packed,
        "training__deterministic": True,
    }
    whole = on_gpu.run(f"deterministic-{packed}", **options)
    again = on_gpu.run(f"again-{packed}", **options)
    assert exact(again) == exact(whole)
    published = next(c for c in whole.events(CheckpointPublished) if c.step == 3)
    attempt = on_gpu.prepare(
        f"resumed-{packed}",
        on_gpu.spec(**options),
        checkpoint=published.path,
        checkpoint_digest=published.manifest_digest,
    )
    resumed = on_gpu.finish(attempt, on_gpu.start(attempt))
    assert exact(resumed) == {n: step for n, step in exact(whole).items() if n > 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dp2", {}),
        ("dp2-selective", {"model__enable_gradient_checkpointing": True, "model__recompute": "selective"}),
        (
            "pp2-vpp2",
            {
                "model__megatron__pipeline_model_parallel_size": 2,
                "model__megatron__virtual_pipeline_model_parallel_size": 2,
            },
        ),
        ("tp2", {"model__megatron__tensor_model_parallel_size": 2}),
        (
            "tp2-sp",
            {"model__megatron__tensor_model_parallel_size": 2, "model__megatron__sequence_parallel": True},
        ),
        ("pp2", {"model__megatron__pipeline_model_parallel_size": 2}),
        ("pp2-packed", {"model__megatron__pipeline_model_parallel_size": 2, "training__use_rmpad": True}),
        ("cp2", {"model__megatron__context_parallel_size": 2}),
        ("cp2-bf16", {"model__megatron__context_parallel_size": 2}),
        ("cp2-packed", {"model__megatron__context_parallel_size": 2, "training__use_rmpad": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_agree_with_one_gpu(
    on_gpu: Trainer, gpus: int, name: str, options: dict[str, object]
) -> None:
    if gpus < 2:
        pytest.skip("one GPU on this machine: layouts of two were not run")
    # Packed samples in BF16, for which there is a kernel of its own.
    is_bf16 = "training__use_rmpad" in options or name.endswith("bf16")
    dtype, tolerance = ({}, 2e-2) if is_bf16 else (FP32, 1e-4)
    one = on_gpu.run("one-bf16" if not dtype else "fp32", **dtype)
    two = on_gpu.run(name, ranks=2, **dtype, **options)
    assert losses(two) == pytest.approx(losses(one), rel=tolerance)
