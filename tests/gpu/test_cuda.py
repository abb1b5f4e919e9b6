"""The trainer on GPUs: the numbers of the CPU, BF16, packed samples, recomputation, and exact resume."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import CheckpointPublished, ModelLoaded
from tests.builders.paths import RANKS
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftd.wire.attempt.directory import AttemptDir
    from tests.builders.trainer.trainers import Run, Trainer

pytestmark = pytest.mark.gpu

TOGETHER = RANKS / "together_ranks.py"
KERNELS = RANKS / "kernels_interpreted.py"
FP32: dict[str, Any] = {MEGATRON + "params_dtype": "float32"}
PACKED: dict[str, Any] = {"training__use_rmpad": True}
FOUR: dict[str, Any] = {"training__micro_batch_size_per_gpu": 4}
EXACT: dict[str, Any] = FOUR | {"training__deterministic": True}
LEAN: dict[str, Any] = {"optimizer__precision": "lean"}
RECOMPUTE: dict[str, Any] = {"model__enable_gradient_checkpointing": True}
LORA: dict[str, Any] = {"model__lora__rank": 4, "model__lora__dropout": 0.1, "optimizer__lr": 1e-2}
QLORA: dict[str, Any] = LORA | {"model__quantize": "nf4"}
ONE_GPU: dict[str, dict[str, Any]] = {
    "fp32-padded": FP32,
    "fp32-packed": FP32 | PACKED,
    "bf16-padded": FOUR,
    "bf16-packed": FOUR | PACKED,
    "exact-padded": EXACT,
    "exact-packed": EXACT | PACKED,
    "again-padded": EXACT,
    "again-packed": EXACT | PACKED,
    "exact-lean": EXACT | LEAN,
    "again-lean": EXACT | LEAN,
    "fp32-lora": FP32 | LORA,
    "fp32-qlora": FP32 | QLORA,
    "exact-lora": EXACT | LORA,
    "again-lora": EXACT | LORA,
    "exact-qlora": EXACT | QLORA,
    "again-qlora": EXACT | QLORA,
    "exact-full": EXACT | RECOMPUTE,
    "exact-half": EXACT | RECOMPUTE | {"model__recompute_layers": 2},
    "exact-selective": EXACT | RECOMPUTE | {"model__recompute": "selective"},
}
# Runs that are trained twice, and resumed.
EXACTLY = ("padded", "packed", "lean", "lora", "qlora")
TP2, PP2, CP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context")
)
SP, VPP2 = (
    {MEGATRON + "sequence_parallel": True},
    {MEGATRON + "virtual_pipeline_model_parallel_size": 2},
)
# Layout → what is trained in it, in one torchrun.
TWO_GPUS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {"padded": {}, "selective": RECOMPUTE | {"model__recompute": "selective"}},
    "tp2": {"padded": TP2, "sp": TP2 | SP, "sp-lora": LORA | TP2 | SP},
    "pp2": {"padded": PP2, "packed": PP2 | PACKED, "qlora": QLORA | PP2},
    "pp2-vpp2": {"padded": PP2 | VPP2, "packed": PP2 | VPP2 | PACKED},
    "cp2": {"padded": CP2, "packed": CP2 | PACKED},
}


def prepare(trainer: Trainer, ranks: int, variants: Mapping[str, dict[str, Any]]) -> dict[str, AttemptDir]:
    return {name: trainer.prepare(name, trainer.spec(ranks, **given)) for name, given in variants.items()}


@pytest.fixture(scope="module")
def one(on_gpu: Trainer) -> dict[str, Run]:
    """The runs of `ONE_GPU`."""
    return on_gpu.together(prepare(on_gpu, 1, ONE_GPU), TOGETHER)


@pytest.fixture(scope="module")
def on_the_cpu(on_cpu: Trainer) -> dict[str, Run]:
    """Those of them in FP32, on the CPU."""
    return on_cpu.together(
        prepare(on_cpu, 1, {name: given for name, given in ONE_GPU.items() if "fp32" in name}), TOGETHER
    )


def losses(run: Run) -> list[float]:
    return [step.loss for step in run.steps().values()]


def exact(run: Run) -> dict[int, tuple[float, float, str]]:
    return {n: (s.loss, s.grad_norm, s.samples_digest) for n, s in run.steps().items()}


def test_kernels_compute_what_pytorch_does(gpus: int) -> None:
    run = subprocess.run([sys.executable, str(KERNELS), "cuda"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_nf4_is_read_at_the_speed_of_the_memory(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from sftd.trainer.model.quantize.nf4 import Quantized

    q = Quantized((2 * 14336, 4096), torch.device("cuda"))
    q.fill(torch.randn(2 * 14336, 4096, device="cuda"))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for n in range(30):
        if n == 10:
            begin.record()
        weight = q.dequantize(torch.bfloat16)
    end.record()
    end.synchronize()
    size = 20 * (q.codes.nbytes + q.scales.nbytes + weight.nbytes)
    with capsys.disabled():
        print(f"\nNF4 to BF16: {size / begin.elapsed_time(end) / 1e9:.2f} TB/s")


# Heads of 64 in groups of four, odd lengths, and q, k and v as the trainer has them: tokens first in memory. The scores of a
# group of a row have 4 · 320² · 2 bytes.
@pytest.mark.parametrize("held", [2 << 30, 4 * 320**2 * 2 * 5, 4 * 320**2 * 2, 1], ids=str)
def test_deterministic_attention_is_right_and_the_same_again(
    gpus: int, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    import torch

    from sftd.trainer.model.kernels import exact_attention

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU: deterministic attention is PyTorch's own")
    monkeypatch.setattr(exact_attention, "SCORES_BYTES", held)
    batch, heads, groups, length, width = 3, 8, 2, 317, 64
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, grad = (
        torch.randn(length, batch, n, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for n in (heads, groups, groups, heads)
    )
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(heads // groups, 1) for x in inputs[1:])
    scores = inputs[0] @ keys.transpose(-1, -2) / math.sqrt(width)
    seen = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    out = scores.masked_fill(~seen, -math.inf).softmax(-1) @ values
    expected = [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]

    def computed() -> list[torch.Tensor]:
        found = exact_attention.attend(q, k, v, width**-0.5)
        return [found.detach(), *torch.autograd.grad(found, (q, k, v), grad)]

    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        assert exact_attention.takes(q, k, v, True)
        first, *again = (computed() for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    for found, reference in zip(first, expected, strict=True):
        assert float((found - reference).norm() / reference.norm()) < 5e-3
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))
    # With the last of `held` no part fits, and FlashAttention computes it.
    if exact_attention.frontend() is not None and held > 1:
        assert any(exact_attention._backwards.values())


@pytest.mark.parametrize("rows", ["padded", "packed", "lora", "qlora"])
def test_fp32_agrees_with_the_cpu(one: dict[str, Run], on_the_cpu: dict[str, Run], rows: str) -> None:
    gpu, cpu = one[f"fp32-{rows}"], on_the_cpu[f"fp32-{rows}"]
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-4)
    assert gpu.events(ModelLoaded)[0].dtype == "float32"


def test_bf16_trains_padded_and_packed_alike(one: dict[str, Run]) -> None:
    padded, packed = one["bf16-padded"], one["bf16-packed"]
    assert padded.events(ModelLoaded)[0].dtype == "bfloat16"
    assert not padded.events(ModelLoaded)[0].environment["deterministic"]
    assert all(map(math.isfinite, losses(padded)))
    assert losses(packed) == pytest.approx(losses(padded), rel=2e-2)
    step = padded.steps()[6]
    assert step.peak_memory_bytes is not None
    assert step.peak_memory_bytes < 2**30


def test_the_lean_optimizer_trains_as_the_full_one(one: dict[str, Run]) -> None:
    assert losses(one["exact-lean"]) == pytest.approx(losses(one["exact-padded"]), rel=2e-2)
    assert losses(one["exact-lean"])[1:] != losses(one["exact-padded"])[1:]


@pytest.mark.parametrize("recompute", ["full", "selective", "half"])
def test_recomputing_changes_no_bit(one: dict[str, Run], recompute: str) -> None:
    assert exact(one[f"exact-{recompute}"]) == exact(one["exact-padded"])


@pytest.fixture(scope="module")
def resumed(on_gpu: Trainer, one: dict[str, Run]) -> dict[str, Run]:
    """The deterministic runs gone on with from step 3, in new processes."""
    attempts = {}
    for rows in EXACTLY:
        published = next(c for c in one[f"exact-{rows}"].events(CheckpointPublished) if c.step == 3)
        attempts[rows] = on_gpu.prepare(
            f"resumed-{rows}",
            on_gpu.spec(**ONE_GPU[f"exact-{rows}"]),
            checkpoint=published.path,
            checkpoint_digest=published.manifest_digest,
        )
    return on_gpu.together(attempts, TOGETHER)


@pytest.mark.parametrize("rows", EXACTLY)
def test_resume_is_bit_for_bit(one: dict[str, Run], resumed: dict[str, Run], rows: str) -> None:
    whole = one[f"exact-{rows}"]
    assert exact(one[f"again-{rows}"]) == exact(whole)
    assert exact(resumed[rows]) == {n: step for n, step in exact(whole).items() if n > 3}


@pytest.mark.parametrize("layout", TWO_GPUS)
def test_layouts_agree_with_one_gpu(on_gpu: Trainer, gpus: int, one: dict[str, Run], layout: str) -> None:
    if gpus < 2:
        pytest.skip("one GPU on this machine: layouts of two were not run")
    # Packed samples in BF16, for which there is a kernel of its own.
    variants = {
        f"{layout}-{name}": given if name == "packed" else given | FP32
        for name, given in TWO_GPUS[layout].items()
    }
    for name, two in on_gpu.together(prepare(on_gpu, 2, variants), TOGETHER).items():
        last = name.rpartition("-")[2]
        reference = {"packed": "bf16-packed", "lora": "fp32-lora", "qlora": "fp32-qlora"}.get(
            last, "fp32-padded"
        )
        tolerance = 2e-2 if last == "packed" else 1e-4
        assert losses(two) == pytest.approx(losses(one[reference]), rel=tolerance), name
