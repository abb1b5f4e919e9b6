"""Tokens in the order of their experts, and back: without atomic sums, and without waiting for the device.

A rank's experts are computed in descending order: so their weights lie in memory once Megatron's data parallelism, which fills
its buffers from the last parameter on, has placed them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class ExpertRows(NamedTuple):
    """The rows of a rank's experts. ends: int32 [experts], on the device: the row after each expert's last one, experts in
    descending order. source: the tokens [t, h] that the rows were spread from, and the rows of each int32 [t, k], where no other
    rank has sent any."""

    ends: Tensor
    source: tuple[Tensor, Tensor] | None = None


def rows_of_tokens(taken: Tensor, count: int, here: int) -> tuple[Tensor, Tensor]:
    """taken bool [t, experts], `count` in each row → (rows of each token int32 [t, count], experts ascending; where the rows of
    each expert end, int32 [experts]). Rows are sorted by rank of `here` experts, descending expert, token."""
    # A sum of integers has the same bits in any order.
    ordinals = taken.t().contiguous().cumsum(1, dtype=torch.int32)
    counts = ordinals[:, -1]
    ends = ends_of(descending(counts, here))
    starts = descending(ends, here) - counts
    if taken.is_cuda:
        from sftd.trainer.model.kernels import routing

        return routing.rows_of_tokens(taken.contiguous(), ordinals, starts, count), ends
    return (ordinals + (starts - 1)[:, None]).t()[taken].view(-1, count), ends


def descending(experts: Tensor, here: int) -> Tensor:
    """Values of experts [..., experts], reversed among the `here` experts of a rank."""
    return experts.unflatten(-1, (-1, here)).flip(-1).flatten(-2)


def ends_of(counts: Tensor) -> Tensor:
    """Numbers of rows → where each expert's rows end, int32."""
    return counts.cumsum(0, dtype=torch.int32)


def experts_of(ends: Tensor, count: int) -> Tensor:
    """The expert, in their order, of each of `count` rows: int32."""
    rows = torch.arange(count, dtype=torch.int32, device=ends.device)
    return torch.searchsorted(ends, rows, out_int32=True, side="right")


def spread(tokens: Tensor, slots: Tensor) -> Tensor:
    """tokens [t, h], slots [t, k] → [t · k, h]: each token in each of its rows."""
    if tokens.is_cuda:
        from sftd.trainer.model.kernels import routing

        return routing.spread(tokens, slots)
    rows = tokens.new_empty(slots.numel(), tokens.shape[1])
    rows[slots.flatten().long()] = tokens.repeat_interleave(slots.shape[1], 0)
    return rows


def collect(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [t · k, h], slots [t, k] → [t, h]: the FP32 sum over each token's rows, in their order in `slots`."""
    if rows.is_cuda:
        from sftd.trainer.model.kernels import routing

        return routing.collect(rows, slots)
    total = torch.zeros(slots.shape[0], rows.shape[1])
    for column in slots.t().long():
        total += rows[column].float()
    return total.to(rows.dtype)


def _weights_to_rows(weights: Tensor, taken: Tensor, slots: Tensor) -> Tensor:
    if weights.is_cuda:
        from sftd.trainer.model.kernels import routing

        return routing.weights_to_rows(weights, taken, slots)
    rows = weights.new_empty(slots.numel())
    rows[slots.flatten().long()] = weights[taken]
    return rows


def _weights_from_rows(rows: Tensor, taken: Tensor, slots: Tensor) -> Tensor:
    if rows.is_cuda:
        from sftd.trainer.model.kernels import routing

        return routing.weights_from_rows(rows, taken, slots)
    weights = rows.new_zeros(taken.shape)
    weights[taken] = rows[slots.flatten().long()]
    return weights


class Spread(Function):
    """(tokens [t, h], weights FP32 [t, experts], taken bool [t, experts], slots) → rows [t · k, h], their weights FP32 [t · k]."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, taken: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(taken, slots)
        return spread(tokens, slots), _weights_to_rows(weights, taken, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        taken, slots = ctx.saved_tensors
        return collect(grads[0], slots), _weights_from_rows(grads[1], taken, slots), None, None


class Collect(Function):
    """(rows [t · k, h], slots [t, k]) → the sum of each token's rows [t, h]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return collect(rows, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return spread(grads[0], slots), None
