"""RMSNorm fused with the preceding residual addition; its backward adds the residual's gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Backward programs per multiprocessor. Each sums the weight's gradient over its own rows.
_PROGRAMS_PER_SM = 4


@triton.jit
def rms_norm_forward(
    x, delta, weight, total, y, rstd, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: total = x + delta, y = its RMSNorm, rstd = 1 / sqrt(mean(total²) + eps)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    place = row * width + columns
    value = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + place, mask=is_inside, other=0.0).to(tl.float32)
        # Normalise the rounded sum, because backward reads that.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=is_inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    gain = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(y + place, (value * scale * gain).to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def rms_norm_backward(
    dy,
    d_total,
    x,
    weight,
    rstd,
    dx,
    d_weight,
    rows,
    width,
    HAS_RESIDUAL: tl.constexpr,
    IS_TRAINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every `num_programs`-th row: dx, and if the weight is trained this program's part of its gradient."""
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    gain = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    sum_d_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        place = row * width + columns
        scale = tl.load(rstd + row)
        normed = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + place, mask=is_inside, other=0.0).to(tl.float32)
        if IS_TRAINED:
            sum_d_weight += grad * normed
        grad *= gain
        result = (grad - normed * (tl.sum(grad * normed, axis=0) / width)) * scale
        if HAS_RESIDUAL:
            result += tl.load(d_total + place, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=is_inside)
    if IS_TRAINED:
        tl.store(d_weight + tl.program_id(0) * width + columns, sum_d_weight, mask=is_inside)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _run_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    total = x if delta is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    rms_norm_forward[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        total,
        y,
        rstd,
        width,
        eps,
        HAS_DELTA=delta is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return total, y, rstd


def _run_backward(
    d_total: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, *, is_trained: bool
) -> tuple[Tensor, Tensor | None]:
    width = total.shape[-1]
    rows, block = rstd.numel(), triton.next_power_of_2(width)
    programs = min(rows, _PROGRAMS_PER_SM * _multiprocessors(total.device))
    dx = torch.empty_like(total)
    d_weight = torch.empty(programs if is_trained else 0, width, dtype=torch.float32, device=total.device)
    rms_norm_backward[(programs,)](
        dy.contiguous(),
        dy if d_total is None else d_total.contiguous(),
        total,
        weight,
        rstd,
        dx,
        d_weight,
        rows,
        width,
        HAS_RESIDUAL=d_total is not None,
        IS_TRAINED=is_trained,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return dx, d_weight.sum(0).to(weight.dtype) if is_trained else None


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter, in the tests
    return torch.cuda.get_device_properties(device).multi_processor_count


class RmsNorm(torch.autograd.Function):
    """(x [..., h], weight [h], eps) → y [..., h], as `ops.rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One program a row."""
        x = x.contiguous()
        _, y, rstd = _run_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients of x and weight."""
        x, weight, rstd = ctx.saved_tensors
        found = _run_backward(None, grads[0], x, weight, rstd, is_trained=ctx.needs_input_grad[1])
        return *found, None


class AddRmsNorm(torch.autograd.Function):
    """(x, delta or None, weight, eps) → (x + delta, its norm), as `ops.add_rms_norm`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """One program a row."""
        x = x.contiguous()
        total, y, rstd = _run_forward(x, None if delta is None else delta.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_delta = delta is not None
        return (total if ctx.has_delta else total.view_as(total)), y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Gradients of x, delta (the same tensor) and weight."""
        total, weight, rstd = ctx.saved_tensors
        is_trained = ctx.needs_input_grad[2]
        dx, d_weight = _run_backward(grads[0], grads[1], total, weight, rstd, is_trained=is_trained)
        return dx, dx if ctx.has_delta else None, d_weight, None
