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
    """What layers keep of the first `length` tokens, by layer number: keys and values, each [1, groups, length, head_dim], or the
    projections [length, 1, …] of a gated delta net."""

    length: int = 0
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


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

    positions: int64 [s], each token's position in its own sample.
    lengths: int64 [s, b], the number of tokens of each token's sample; None if that is the number of all tokens so far.
    samples: int64 [s, b], the number of each token's sample in the micro-batch, -1 of padding; None for a generated answer.
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
