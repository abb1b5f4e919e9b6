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
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sftd.trainer.optimizer.lean_update import Rectangle
from sftd.trainer.optimizer.rectangles import rectangles
from sftd.trainer.runtime.megatron_edges.saving import optimizer_tensors, store_share
from sftd.trainer.runtime.megatron_edges.training import has_master_weights, parts_of

State = dict[int, dict[str, list[ShardedTensor]]]

# The only optimizer format that works without TransformerEngine and that another layout can load.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class SharePiece(NamedTuple):
    """A rectangle of this rank's share of a parameter: `shape`, at `offset` of the whole tensor in the checkpoint that `shard`
    is a part of. `taken` is the index of its first element in the share."""

    shard: ShardedTensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    taken: int

    @property
    def rectangle(self) -> Rectangle:
        """Where it is in the whole parameter, taken as a matrix of the length of its last dimension."""
        *whole, _ = self.shard.global_shape
        *above, column = self.offset
        *sides, columns = self.shape
        row = 0
        for size, index in zip(whole, above, strict=True):
            row = row * size + index
        # Its rows follow each other if only the outermost of several dimensions is cut.
        inner = next((n for n, side in enumerate(sides, 1) if side > 1), len(sides))
        assert tuple(sides[inner:]) == tuple(whole[inner:]), f"{self.shard.key} is cut along inner dimensions"
        return Rectangle(self.shard.key, row, column, math.prod(sides), columns)


def content() -> dict[str, Any]:
    """The format of a checkpoint, as Megatron takes it to list the parts."""
    return dict(CONTENT, dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True))


def install_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Have every part of the optimizer store and read its own share, with torch's AdamW, in Megatron's format.

    FP32 weights share memory with their master copy, which is therefore left out. Lean BF16 weights have none.
    """
    for part in parts_of(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        moments = tuple(part.optimizer_state_keys)
        keys = ("param", *moments) if has_master_weights(part) else moments
        store_share(part, partial(_own_share, part, keys))


def _own_share(part: DistributedOptimizer, keys: tuple[str, ...], model: dict[str, Any]) -> State:
    state: State = {}
    for parameter, pieces in own_pieces(part, model):
        tensors = optimizer_tensors(part, parameter)
        state[len(state)] = {key: [_stored(piece, key, tensors[key]) for piece in pieces] for key in keys}
    return state


def own_pieces(
    part: DistributedOptimizer, model: dict[str, Any]
) -> Iterator[tuple[torch.nn.Parameter, list[SharePiece]]]:
    """The parameters of which this rank has a share, and its share of each in pieces. `model`: the parameters' places in a
    checkpoint, as Megatron lists them."""
    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(model)[0])}
    for ranges in part.gbuf_ranges:
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, share in bucket["param_map"].items():
                start, end = share["param"].start, share["param"].end
                shards = _whole(places[parameter])
                yield parameter, [p for shard, first in shards for p in _pieces(shard, first, start, end)]


def _whole(place: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """The parts of this rank's parameter in the checkpoint, each with the index of its first element."""
    if isinstance(place, ShardedTensor):
        return [(place, 0)]
    # Run the factory on a meta tensor to find the elements of each part.
    shape = torch.empty(place.data.shape, dtype=place.data.dtype, device="meta")
    built = list(nested_values(place.build_fn(place.key, shape, place.replica_id, None)))
    assert all(s.data.is_contiguous() for s in built), f"{place.key} is not cut along its rows"
    return [(s, s.data.storage_offset()) for s in built]


def _pieces(shard: ShardedTensor, first: int, start: int, end: int) -> Iterator[SharePiece]:
    """The rectangles of `shard` within elements [`start`, `end`) of the parameter; `shard` starts at element `first`."""
    low, high = max(start, first), min(end, first + math.prod(shard.local_shape))
    if low >= high:
        return
    ones = (1,) * shard.prepend_axis_num
    taken = low - start
    for corner, sides in rectangles(tuple(shard.local_shape), low - first, high - first):
        offset = (*(0 for _ in ones), *corner)
        where = tuple(a + b for a, b in zip(shard.global_offset, offset, strict=True))
        yield SharePiece(shard, where, (*ones, *sides), taken)
        size = math.prod(sides)
        taken += size


def _stored(piece: SharePiece, key: str, share: Tensor) -> ShardedTensor:
    """`piece` of the tensor `key`, of which this rank has `share`."""
    shard, shape = piece.shard, piece.shape
    return ShardedTensor(
        key=f"optimizer.state.{key}.{shard.key}",
        data=share.detach().view(-1)[piece.taken : piece.taken + math.prod(shape)].view(shape),
        dtype=share.dtype,
        local_shape=shape,
        global_shape=shard.global_shape,
        global_offset=piece.offset,
        # No grid: the ranks' pieces have arbitrary shapes.
        axis_fragmentations=None,
        # The last number is the data-parallel replica. No other rank has these elements.
        replica_id=(*shard.replica_id[:-1], 0),
        allow_shape_mismatch=shard.allow_shape_mismatch,
    )
