"""SwiGLU of an expert's rows, each multiplied by the weight that its token gives the expert: see `grouped/activation.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gate_and_up(x, bias, experts, row, columns, width, BIASED: tl.constexpr):
    is_inside = columns < width
    place = row * 2 * width + columns
    gate = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + width, mask=is_inside, other=0.0).to(tl.float32)
    if BIASED:
        place = tl.load(experts + row).to(tl.int64) * 2 * width + columns
        gate += tl.load(bias + place, mask=is_inside, other=0.0).to(tl.float32)
        up += tl.load(bias + place + width, mask=is_inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _factors(gate, up, CLAMPED: tl.constexpr):
    """The sigmoid, gate times it, and what that is multiplied by."""
    if CLAMPED:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        share = tl.sigmoid(1.702 * gate)
    else:
        share = tl.sigmoid(gate)
    return share, gate * share, up


@triton.jit
def weighted_swiglu_forward(
    x, weight, bias, experts, y, width, BIASED: tl.constexpr, CLAMPED: tl.constexpr, BLOCK: tl.constexpr
):
    """`BLOCK` columns of one row of y."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = _gate_and_up(x, bias, experts, row, columns, width, BIASED)
    _share, silu, factor = _factors(gate, up, CLAMPED)
    value = silu * factor * tl.load(weight + row)
    tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=columns < width)


@triton.jit
def weighted_swiglu_backward(
    dy,
    x,
    weight,
    bias,
    experts,
    y,
    dx,
    d_weight,
    width,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: y again, both halves of dx, and the gradient of the weight."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < width
        gate, up = _gate_and_up(x, bias, experts, row, columns, width, BIASED)
        share, silu, factor = _factors(gate, up, CLAMPED)
        grad = tl.load(dy + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
        total += grad * silu * factor
        value = silu * factor * scale
        tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=is_inside)
        grad *= scale
        d_up = grad * silu
        if CLAMPED:
            d_gate = tl.where(gate <= 7.0, grad * factor * (share + 1.702 * silu * (1.0 - share)), 0.0)
            d_up = tl.where((up >= -7.0) & (up <= 7.0), d_up, 0.0)
        else:
            d_gate = grad * factor * (share + silu * (1.0 - share))
        place = row * 2 * width + columns
        tl.store(dx + place, d_gate.to(dx.dtype.element_ty), mask=is_inside)
        tl.store(dx + place + width, d_up.to(dx.dtype.element_ty), mask=is_inside)
    tl.store(d_weight + row, tl.sum(total, axis=0))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor | None, *, is_clamped: bool
) -> Tensor:
    """x [n, 2f], weight FP32 [n], bias [experts, 2f] and the expert of each row int32 [n], or None → [n, f]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weighted_swiglu_forward[(rows, triton.cdiv(width, block))](
        x,
        weight,
        x if bias is None else bias,
        x if experts is None else experts,
        y,
        width,
        BIASED=bias is not None,
        CLAMPED=is_clamped,
        BLOCK=block,
        num_warps=4,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor | None, *, is_clamped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """→ (y [n, f] with the bits of forward's, dx [n, 2f], gradient of the weight FP32 [n])."""
    rows, width = dy.shape
    y, dx, d_weight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weighted_swiglu_backward[(rows,)](
        dy,
        x,
        weight,
        x if bias is None else bias,
        x if experts is None else experts,
        y,
        dx,
        d_weight,
        width,
        BIASED=bias is not None,
        CLAMPED=is_clamped,
        BLOCK=block,
        num_warps=4,
    )
    return y, dx, d_weight
