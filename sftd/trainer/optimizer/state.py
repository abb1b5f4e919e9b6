"""The optimizer's state in a checkpoint: every rank stores and reads its own share, directly from and to its tensors.

Megatron's `fully_reshardable` format holds each moment in the shape of its parameter, so that any layout can read it.
For each save and load, Megatron's code (distrib_optimizer.py:1223 and :1690) gathers the whole state into the host memory
of every data-parallel rank: 12 bytes per parameter. But a rank's share of a parameter is a range of row-major elements,
which is a few rectangles, and the storage format supports rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sftd.trainer.optimizer.rectangles import rectangles
from sftd.trainer.runtime.megatron_edges.saving import optimizer_tensors, store_share
from sftd.trainer.runtime.megatron_edges.training import parts_of

State = dict[int, dict[str, list[ShardedTensor]]]


def install_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Have every part of the optimizer store and read its own share, with torch's AdamW, in Megatron's format.

    FP32 weights share memory with their master copy, which is therefore left out.
    """
    for part in parts_of(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        moments = tuple(part.optimizer_state_keys)
        keys = moments if part.config.params_dtype == torch.float32 else ("param", *moments)
        store_share(part, partial(_own_share, part, keys))


def _own_share(part: DistributedOptimizer, keys: tuple[str, ...], model: dict[str, Any]) -> State:
    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(model)[0])}
    state: State = {}
    for ranges in part.gbuf_ranges:
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, share in bucket["param_map"].items():
                start, end = share["param"].start, share["param"].end
                tensors = optimizer_tensors(part, parameter)
                shards = _whole(places[parameter])
                state[len(state)] = {
                    key: [
                        piece
                        for shard, first in shards
                        for piece in _pieces(shard, first, key, tensors[key], start, end)
                    ]
                    for key in keys
                }
    return state


def _whole(place: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """The parts of this rank's parameter in the checkpoint, each with the index of its first element."""
    if isinstance(place, ShardedTensor):
        return [(place, 0)]
    # Run the factory on a meta tensor to find the elements of each part.
    shape = torch.empty(place.data.shape, dtype=place.data.dtype, device="meta")
    built = list(nested_values(place.build_fn(place.key, shape, place.replica_id, None)))
    assert all(s.data.is_contiguous() for s in built), f"{place.key} is not cut along its rows"
    return [(s, s.data.storage_offset()) for s in built]


def _pieces(
    shard: ShardedTensor, first: int, key: str, share: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """The rectangles of `shard` within elements [`start`, `end`) of the parameter; `shard` starts at element `first`.

    `share` holds the elements [`start`, `end`).
    """
    low, high = max(start, first), min(end, first + math.prod(shard.local_shape))
    if low >= high:
        return
    values, ones = share.detach().view(-1), (1,) * shard.prepend_axis_num
    taken = low - start
    for corner, sides in rectangles(tuple(shard.local_shape), low - first, high - first):
        shape, offset = (*ones, *sides), (*(0 for _ in ones), *corner)
        size = math.prod(shape)
        yield ShardedTensor(
            key=f"optimizer.state.{key}.{shard.key}",
            data=values[taken : taken + size].view(shape),
            dtype=share.dtype,
            local_shape=shape,
            global_shape=shard.global_shape,
            global_offset=tuple(a + b for a, b in zip(shard.global_offset, offset, strict=True)),
            # No grid: the ranks' pieces have arbitrary shapes.
            axis_fragmentations=None,
            # The last number is the data-parallel replica. No other rank has these elements.
            replica_id=(*shard.replica_id[:-1], 0),
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        taken += size
