"""SwiGLU of gate and up projections that lie side by side, as one matrix product computes them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def swiglu_forward(x, y, width, BLOCK: tl.constexpr):
    """`BLOCK` columns of one row of y."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask=is_inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask=is_inside).to(tl.float32)
    tl.store(y + row * width + columns, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def swiglu_backward(dy, x, dx, width, BLOCK: tl.constexpr):
    """`BLOCK` columns of both halves of one row of dx."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    place = row * 2 * width + columns
    gate = tl.load(x + place, mask=is_inside).to(tl.float32)
    up = tl.load(x + place + width, mask=is_inside).to(tl.float32)
    grad = tl.load(dy + row * width + columns, mask=is_inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    d_gate = grad * up * (share + silu * (1.0 - share))
    tl.store(dx + place, d_gate.to(dx.dtype.element_ty), mask=is_inside)
    tl.store(dx + place + width, (grad * silu).to(dx.dtype.element_ty), mask=is_inside)


class SwiGlu(torch.autograd.Function):
    """x [..., 2f] → silu(x[..., :f]) · x[..., f:], as `ops.swiglu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """One program for `_BLOCK` columns of a row."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        swiglu_forward[(y.numel() // width, triton.cdiv(width, _BLOCK))](
            x, y, width, BLOCK=_BLOCK, num_warps=8
        )
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of x."""
        (x,) = ctx.saved_tensors
        width = x.shape[-1] // 2
        dx = torch.empty_like(x)
        grid = (x.numel() // (2 * width), triton.cdiv(width, _BLOCK))
        swiglu_backward[grid](grads[0].contiguous(), x, dx, width, BLOCK=_BLOCK, num_warps=8)
        return dx
