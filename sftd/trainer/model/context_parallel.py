"""Gathers the keys and values of a whole sequence from the context-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class _GatherStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ranks = parallel_state.get_context_parallel_world_size()
        mine = torch.stack((key, value))
        parts = mine.new_empty((2 * ranks, *mine.shape[1:]))
        dist.all_gather_into_tensor(parts, mine, group=parallel_state.get_context_parallel_group())
        # [ranks, key or value, front or back, chunk, …]
        parts = parts.unflatten(0, (ranks, 2)).unflatten(2, (2, -1))
        order = [(rank, 0) for rank in range(ranks)] + [(rank, 1) for rank in reversed(range(ranks))]
        keys, values = (torch.cat([parts[rank, i, side] for rank, side in order]) for i in (0, 1))
        return keys, values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        ranks = parallel_state.get_context_parallel_world_size()
        chunks = [grad.unflatten(0, (2 * ranks, -1)) for grad in grad_outputs]
        parts = torch.stack(
            [chunk[c] for rank in range(ranks) for chunk in chunks for c in (rank, 2 * ranks - 1 - rank)]
        )
        # [ranks · 4, chunk, …] → this rank's [4, chunk, …]: front and back of the keys, then of the values
        mine = parts.new_empty((4, *parts.shape[1:]))
        dist.reduce_scatter_tensor(mine, parts, group=parallel_state.get_context_parallel_group())
        key, value = mine[:2].flatten(0, 1), mine[2:].flatten(0, 1)
        return key, value


def gather_stream(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's keys and values, each [s / CP, …] in the order of `sequence_shards.spans` → those of all tokens, in
    order, each [s, …].

    Backward sums their gradients over the context-parallel ranks.
    """
    return _GatherStream.apply(key, value)
