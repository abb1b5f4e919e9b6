"""Token layout of a micro-batch: positions, packed samples, and the shares of context-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from sftd.trainer.data.sequence_shards import cut_segments, spans
from sftd.trainer.data.upload import upload


@dataclass
class KeyValueCache:
    """What layers keep of the tokens of several answers, by layer number: keys and values, each [rows, groups, capacity, head_dim],
    or the projections [rows, 1, capacity, …] of a gated delta net.

    lengths: number of tokens of each answer so far. Places after them hold padding or zeros; the answer's next tokens overwrite
    them.
    """

    lengths: list[int]
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def append(self, layer: int, positions: Tensor, *new: Tensor) -> tuple[Tensor, ...]:
        """Store each of `new` [rows, groups, s, …] at `positions` int64 [s, rows], or [s] if all answers have the same length.
        Returns what the layer holds, without the unused capacity. `lengths` stays: call `advance` after the last layer."""
        rows, first = len(self.lengths), max(self.lengths)
        stop = first + new[0].shape[2]
        held = self.layers.get(layer, ())
        if not held or held[0].shape[2] < stop:
            # Zeros, because a NaN at an unused place would spread: 0 · NaN is NaN.
            capacity = stop + max(64, stop // 2)
            grown = tuple(x.new_zeros(*x.shape[:2], capacity, *x.shape[3:]) for x in new)
            for larger, old in zip(grown, held, strict=False):
                larger[:, :, :first] = old[:rows, :, :first]
            self.layers[layer] = held = grown
        row = None if positions.dim() == 1 else torch.arange(rows, device=positions.device)[:, None]
        for place, x in zip(held, new, strict=True):
            if row is None:
                place[:rows, :, first:stop] = x
            else:
                place[row, :, positions.T] = x.transpose(1, 2)
        return tuple(x[:rows, :, :stop] for x in held)

    def advance(self, counts: list[int]) -> None:
        """Count the tokens of each answer that `append` stored, without padding."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def join(self, other: KeyValueCache) -> None:
        """Add the answers of another cache after these."""
        rows, length = len(self.lengths), max([0, *self.lengths])
        count, others = len(other.lengths), max(other.lengths)
        for layer, theirs in other.layers.items():
            if not rows:
                self.layers[layer] = theirs
                continue
            joined = []
            for mine, new in zip(self.layers[layer], theirs, strict=True):
                stop = max(length, others)
                place = mine.new_zeros(
                    rows + count, mine.shape[1], stop + max(64, stop // 2), *mine.shape[3:]
                )
                place[:rows, :, :length] = mine[:rows, :, :length]
                place[rows:, :, :others] = new[:count, :, :others]
                joined.append(place)
            self.layers[layer] = tuple(joined)
        self.lengths = self.lengths + other.lengths

    def drop(self, row: int) -> None:
        """Remove an answer. The last one takes its place."""
        length = self.lengths.pop()
        if row == len(self.lengths):
            return
        self.lengths[row] = length
        for tensors in self.layers.values():
            for x in tensors:
                x[row, :, :length] = x[len(self.lengths), :, :length]


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens whose queries this rank computes, cut into segments where samples end.

    keys: the tokens of the whole stream that they attend to. query_ends, key_ends: end of each segment among the queries
    and among those keys, with a leading 0; a segment's queries are the last of its keys. cu_seqlens_q, cu_seqlens_k: the
    same as int32 on the device.
    """

    keys: slice
    query_ends: list[int]
    key_ends: list[int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @cached_property
    def longest_query(self) -> int:
        """Number of queries of the longest segment."""
        return max(stop - start for start, stop in pairwise(self.query_ends))

    @cached_property
    def longest_key(self) -> int:
        """Number of keys of the longest segment."""
        return max(stop - start for start, stop in pairwise(self.key_ends))


def make_chunks(length: int, ends: list[int], *, rank: int, ranks: int, device: torch.device) -> list[Chunk]:
    """The chunks of context-parallel rank `rank` of `ranks`, for `length` tokens with samples that end at `ends` (with a
    leading 0)."""
    chunks = []
    for start, stop in spans(length, rank, ranks):
        first, query_ends, key_ends = cut_segments(start, stop, ends)
        on_device = (upload(np.array(x, np.int32), device) for x in (query_ends, key_ends))
        chunks.append(Chunk(slice(first, stop), query_ends, key_ends, *on_device))
    return chunks


@dataclass
class SequenceLayout(PackedSeqParams):
    """Token layout of a micro-batch. GPTModel passes it to the attention on every pipeline stage.

    It keeps Megatron's ordinary [s, b, h, d] format (`qkv_format` is not "thd"): RoPE uses `positions`, so only the core
    attention handles packed samples and context parallelism.

    positions: int64 [s], each token's position in its own sample; [s, b] where the rows are answers of different lengths.
    lengths: int64 [s, b], the number of tokens of each token's sample, of an answer so far; None if that is the number of all tokens.
    samples: int64 [s, b], the number of each token's sample in the micro-batch, -1 of padding; None for generated answers.
    sample_count: number of samples in the micro-batch.
    chunks: this rank's s tokens in the whole stream, in order; None for rows without packing and context parallelism.
    is_packed: whether samples lie end to end (b is 1).
    dropout_keys: int64 [s, b], see `adapters.dropout`; None without dropout.
    cache: set during generation; every rank then has the whole sequence.
    """

    positions: Tensor = None  # type: ignore[assignment]  # PackedSeqParams' fields all have defaults
    lengths: Tensor | None = None
    samples: Tensor | None = None
    sample_count: int = 0
    chunks: list[Chunk] | None = None
    is_packed: bool = False
    dropout_keys: Tensor | None = None
    cache: KeyValueCache | None = None
