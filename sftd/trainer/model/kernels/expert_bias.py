"""The bias of an expert's output, times the weight of each row: see `grouped/activation.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def add_expert_bias(y, weight, bias, experts, width, BLOCK: tl.constexpr):
    """One block of columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    value = tl.load(y + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    place = tl.load(experts + row).to(tl.int64) * width + columns
    value += tl.load(weight + row) * tl.load(bias + place, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def add_expert_bias_gradient(dy, d_weight, bias, experts, width, BLOCK: tl.constexpr):
    """The gradient of one row's weight."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(experts + row).to(tl.int64) * width
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < width
        grad = tl.load(dy + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
        total += grad * tl.load(bias + first + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(d_weight + row, tl.load(d_weight + row) + tl.sum(total, axis=0))


def add_(y: Tensor, weight: Tensor, bias: Tensor, experts: Tensor) -> None:
    """y [n, h] += weight FP32 [n] · bias [experts, h] of the expert of each row int32 [n]."""
    rows, width = y.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    add_expert_bias[(rows, triton.cdiv(width, block))](
        y, weight, bias, experts, width, BLOCK=block, num_warps=4
    )


def add_weight_gradient_(dy: Tensor, d_weight: Tensor, bias: Tensor, experts: Tensor) -> None:
    """d_weight FP32 [n] += Σ dy [n, h] · bias over each row."""
    rows, width = dy.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    add_expert_bias_gradient[(rows,)](dy, d_weight, bias, experts, width, BLOCK=block, num_warps=4)
