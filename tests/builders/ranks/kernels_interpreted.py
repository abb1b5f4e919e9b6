"""Run by test_kernels.py under Triton's interpreter, and by tests/gpu on a GPU (`cuda` as its argument): each kernel
forward and backward against what sftd/trainer/model/ops.py computes on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sftd.trainer.model import cross_entropy_cpu, ops
from sftd.trainer.model.kernels import cross_entropy, nf4, norm, rotary, swiglu
from sftd.trainer.model.quantize.nf4 import Quantized, levels

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results(function: Function, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
    """Outputs, and the gradients of the inputs for fixed gradients of the outputs."""
    own = [x.to(device, copy=True).requires_grad_() for x in inputs]
    found = function(*own)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    generator = torch.Generator().manual_seed(9)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).to(device) for o in outputs])
    return [*(o.detach().cpu() for o in outputs), *(x.grad.cpu() for x in own if x.grad is not None)]


def compare(kernel: Function, reference: Function, *inputs: Tensor) -> None:
    found, expected = results(kernel, inputs, DEVICE), results(reference, inputs, "cpu")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_norm() -> None:
    x, delta, weight = random(5, 2, 48), random(5, 3, 48)[:, :2], random(48)
    compare(lambda x, w: norm.RmsNorm.apply(x, w, 1e-5), lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight)
    compare(
        lambda x, d, w: norm.AddRmsNorm.apply(x, d, w, 1e-5),
        lambda x, d, w: ops.add_rms_norm(x, d, w, 1e-5),
        x,
        delta,
        weight,
    )
    compare(
        lambda x, w: norm.AddRmsNorm.apply(x * 1, None, w, 1e-5),
        lambda x, w: ops.add_rms_norm(x * 1, None, w, 1e-5),
        x,
        weight,
    )


def check_swiglu() -> None:
    for width in (40, 2050):
        compare(swiglu.SwiGlu.apply, ops.swiglu, random(3, 2, 2 * width))


def check_rotary() -> None:
    # Three groups of two queries and heads of 12: nothing is a power of two.
    angles = torch.stack((random(5, 6).cos(), random(5, 6).sin()))
    for batch in (1, 2):
        compare(
            lambda qkv: rotary.SplitRotary.apply(qkv, angles.to(DEVICE), 3, 12),
            lambda qkv: ops.split_rotary(qkv, angles, 3, 12),
            random(5, batch, 3 * 4 * 12),
        )
    # Gradients as attention hands them back: heads before tokens in memory.
    compare(
        lambda qkv: [
            x.permute(1, 2, 0, 3) * 1.5 for x in rotary.SplitRotary.apply(qkv, angles.to(DEVICE), 3, 12)
        ],
        lambda qkv: [x.permute(1, 2, 0, 3) * 1.5 for x in ops.split_rotary(qkv, angles, 3, 12)],
        random(5, 2, 3 * 4 * 12),
    )


def check_cross_entropy() -> None:
    for width, real in ((5000, 5000), (5000, 4990), (300, 0)):
        logits = random(4, width) * 3
        index = torch.tensor([3, -1, real - 1, 17] if real else [-1] * 4)
        found = tuple(x.cpu() for x in cross_entropy.sums(logits.to(DEVICE), index.to(DEVICE), real))
        expected = cross_entropy_cpu.sums(logits, index, real)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        log_total = found[0] + found[1].log()
        weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
        if not real:
            log_total = torch.zeros(4)
        mine, theirs = logits.to(DEVICE, copy=True), logits.clone()
        cross_entropy.gradient_(mine, *(x.to(DEVICE) for x in (index, log_total, weight)), real)
        mine = mine.cpu()
        cross_entropy_cpu.gradient_(theirs, index, log_total, weight, real)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert not mine[:, real:].any()


def check_nf4() -> None:
    for rows in (4, 37):
        weight = random(rows, 192)
        weight[0, :64] = 0
        here = Quantized(weight.shape, torch.device("cpu"))
        here.fill(weight)
        there = Quantized(weight.shape, torch.device(DEVICE))
        there.fill(weight)
        assert torch.equal(there.codes.cpu(), here.codes)
        assert torch.equal(there.scales.cpu(), here.scales)
        # The interpreter truncates to BF16, a GPU rounds.
        for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
            found = nf4.dequantize(there.codes, there.scales, levels(there.codes.device), dtype)
            assert torch.equal(found.cpu(), here.dequantize(dtype))


if __name__ == "__main__":
    for name, check in (
        ("norm", check_norm),
        ("swiglu", check_swiglu),
        ("rotary", check_rotary),
        ("cross_entropy", check_cross_entropy),
        ("nf4", check_nf4),
    ):
        check()
        print(name, flush=True)
