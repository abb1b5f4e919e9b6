"""The number of parameters that a rank holds, in any layout (tests/trainer compares it with the trainer's tensors)."""

from __future__ import annotations

import msgspec

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec


class Held(msgspec.Struct, frozen=True):
    """Parameters of one rank: `experts` of MoE layers, and the `dense` rest, which is sharded over other ranks."""

    dense: int
    experts: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts


def whole_model(shape: ModelShape) -> int:
    """Parameters of the unsharded model."""
    return held(Spec(), shape, 0).total


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary size rounded up to a multiple of `tensor_parallel`."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def held(spec: Spec, shape: ModelShape, stage: int) -> Held:
    """Parameters of each rank of pipeline stage `stage` (from 0)."""
    m = spec.model.megatron
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    layers = shape.num_hidden_layers // pp
    dense, experts = _layer(spec, shape)
    rows = padded_vocabulary(shape.vocab_size, tp) // tp
    outside = 0
    if stage == 0:
        outside += rows * shape.hidden_size
    if stage == pp - 1:
        outside += shape.hidden_size
        # A tied output layer on a stage without the embedding holds a copy of it.
        if not shape.tie_word_embeddings or pp > 1:
            outside += rows * shape.hidden_size
    return Held(layers * dense + outside, layers * experts)


def _layer(spec: Spec, shape: ModelShape) -> tuple[int, int]:
    tp, h, d = spec.model.megatron.tensor_model_parallel_size, shape.hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    qkv = (heads + 2 * groups) * d
    dense = 2 * h + qkv * h // tp + heads * d * h // tp
    if shape.attention_bias:
        dense += qkv // tp
    if shape.qk_norm:
        dense += 2 * d
    dense += FAMILIES[shape.architecture].added(shape, tp)
    if not shape.num_experts:
        return dense + 3 * h * shape.intermediate_size // tp, 0
    here = shape.num_experts // spec.model.megatron.expert_model_parallel_size
    expert = 3 * h * shape.moe_intermediate_size // spec.model.megatron.expert_tensor_parallel_size
    return dense + shape.num_experts * h, here * expert
