"""SwiGLU of an expert's rows, each multiplied by the weight that its token gives the expert: see `grouped/activation.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def weighted_swiglu_forward(x, weight, y, width, BLOCK: tl.constexpr):
    """`BLOCK` columns of one row of y."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask=is_inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask=is_inside).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * tl.load(weight + row)
    tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def weighted_swiglu_backward(dy, x, weight, y, dx, d_weight, width, BLOCK: tl.constexpr):
    """One row: y again, both halves of dx, and the gradient of the weight."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < width
        place = row * 2 * width + columns
        gate = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
        up = tl.load(x + place + width, mask=is_inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += grad * silu * up
        value = silu * up * scale
        tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=is_inside)
        grad *= scale
        d_gate = grad * up * (share + silu * (1.0 - share))
        tl.store(dx + place, d_gate.to(dx.dtype.element_ty), mask=is_inside)
        tl.store(dx + place + width, (grad * silu).to(dx.dtype.element_ty), mask=is_inside)
    tl.store(d_weight + row, tl.sum(total, axis=0))


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, 2f], weight FP32 [n] → silu(x[:, :f]) · x[:, f:] · weight [n, f]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weighted_swiglu_forward[(rows, triton.cdiv(width, block))](x, weight, y, width, BLOCK=block, num_warps=4)
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ (y [n, f] with the bits of forward's, dx [n, 2f], gradient of the weight FP32 [n])."""
    rows, width = dy.shape
    y, dx, d_weight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weighted_swiglu_backward[(rows,)](dy, x, weight, y, dx, d_weight, width, BLOCK=block, num_warps=4)
    return y, dx, d_weight
