"""Cross-entropy over this rank's share of the vocabulary: one pass for the sums, one for the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def cross_entropy_sums(logits, index, highest, total, target, moment, stride, width, BLOCK: tl.constexpr):
    """One row: its maximum, Σ exp(logit − maximum), the logit of its label, and Σ exp(logit − maximum) · (logit − maximum)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(index + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    first_moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + columns, mask=columns < width, other=float("-inf")).to(
            tl.float32
        )
        # Each lane keeps its own maximum, which avoids a reduction per block.
        larger = tl.maximum(best, value)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        power = tl.exp(value - shift)
        # A power of 0 has no part in the moment, though its logit may be −∞.
        moved = tl.where(summed > 0, first_moment + (best - shift) * summed, 0.0) * tl.exp(best - shift)
        first_moment = moved + tl.where(power > 0, power * (value - shift), 0.0)
        summed = summed * tl.exp(best - shift) + power
        best = larger
    row_best = tl.max(best, axis=0)
    shift = tl.where(row_best == float("-inf"), 0.0, row_best)
    tl.store(highest + row, row_best)
    tl.store(total + row, tl.sum(summed * tl.exp(best - shift), axis=0))
    moved = tl.where(summed > 0, first_moment + (best - shift) * summed, 0.0) * tl.exp(best - shift)
    tl.store(moment + row, tl.sum(moved, axis=0))
    mine = tl.load(logits + row * stride + tl.maximum(label, 0), mask=label >= 0, other=0.0)
    tl.store(target + row, mine.to(tl.float32))


@triton.jit
def cross_entropy_gradient(logits, index, log_total, weight, stride, width, whole, BLOCK: tl.constexpr):
    """One row: overwrites each logit with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(index + row)
    shift = tl.load(log_total + row)
    scale = tl.load(weight + row)
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        place = logits + row * stride + columns
        value = tl.load(place, mask=columns < width, other=float("-inf")).to(tl.float32)
        share = tl.exp(value - shift) - tl.where(columns == label, 1.0, 0.0)
        tl.store(place, (share * scale).to(logits.dtype.element_ty), mask=columns < whole)


def sums(logits: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row-wise over the first `width` columns of logits [n, w]: the maximum, Σ exp(logit − maximum), the logit at `index`
    int64 [n] (0 where `index` is negative), and Σ exp(logit − maximum) · (logit − maximum). Each FP32 [n]."""
    rows = logits.shape[0]
    found = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    cross_entropy_sums[(rows,)](
        logits, index, *found.unbind(), logits.stride(0), width, BLOCK=_BLOCK, num_warps=8
    )
    highest, total, target, moment = found.unbind()
    return highest, total, target, moment


def gradient_(logits: Tensor, index: Tensor, log_total: Tensor, weight: Tensor, width: int) -> None:
    """Overwrite logits [n, w] with (exp(logit − log_total) − [column = index]) · weight, and with 0 from column `width`."""
    cross_entropy_gradient[(logits.shape[0],)](
        logits,
        index,
        log_total,
        weight,
        logits.stride(0),
        width,
        logits.shape[1],
        BLOCK=_BLOCK,
        num_warps=8,
    )
