"""The results of a step, summed over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sftd.trainer.data.batches import MicroBatch
from sftd.trainer.runtime.session import Layout


@dataclass(frozen=True)
class Sums:
    """One step, summed over all ranks. `grad_norm` is global; `peak_memory` is the maximum over the ranks, in bytes.

    `is_written`: every rank has written its share of the save in flight. `figures`: those of `linear_cross_entropy`.
    """

    loss: float
    grad_norm: float
    load_balancing: float
    z: float
    real: int
    padded: int
    stop: bool
    is_written: bool
    peak_memory: int
    figures: list[float]


def sum_over_ranks(
    local: Tensor,
    norm: Tensor,
    router: Tensor,
    layout: Layout,
    batches: Sequence[MicroBatch],
    *,
    wants_stop: bool,
    is_written: bool,
    peak_memory: int,
) -> Sums:
    """Reduce a step's results and stop requests over the ranks in one small all-reduce. Here the host waits for the GPU.

    local: this rank's sums of `Trainee.step`. router: FP64 [2], the routers' losses of its own tokens and layers.
    """
    real, padded = sum(b.real for b in batches), sum(b.tokens.numel() for b in batches)
    # One slot per rank, so that the sum is a gather.
    memory = [0.0] * dist.get_world_size()
    memory[dist.get_rank()] = float(peak_memory)
    counts = [real * layout.counts, padded * layout.counts, wants_stop, is_written]
    mine = torch.tensor([*counts, *memory], dtype=torch.float64).to(local.device, non_blocking=True)
    local = local * layout.counts
    vector = torch.cat([local[:1], router, mine, local[1:]])
    dist.all_reduce(vector)
    values = torch.cat([vector, norm[None]]).tolist()
    figures = 7 + len(memory)
    return Sums(
        loss=values[0],
        grad_norm=values[-1],
        load_balancing=values[1],
        z=values[2],
        real=int(values[3]),
        padded=int(values[4]),
        stop=values[5] > 0,
        is_written=values[6] == dist.get_world_size(),
        peak_memory=int(max(values[7:figures])),
        figures=values[figures:-1],
    )
