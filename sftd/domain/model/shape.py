"""The shape of a model, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The shape of a model. `attention_bias` is that of the QKV projections. `sliding_window` is the attention span in
    tokens, None if unlimited. `layers_without_rope` are the numbers of the layers whose queries and keys are not rotated.

    In a mixture of experts (MoE) every layer has `num_experts` experts of `moe_intermediate_size` units. A token is routed
    to `num_experts_per_tok` experts, weighted by the softmax over all experts, or over the chosen ones with
    `norm_topk_prob`. `unsupported` lists features of config.json that the trainer does not support."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    hidden_act: str = "silu"
    sliding_window: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    layers_without_rope: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()

    @property
    def rope_type(self) -> str:
        """Type of RoPE scaling; `default` if there is none."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))


def recorded_shape(model: Mapping[str, Any]) -> ModelShape:
    """The shape in the `model` of a RunSubmitted, which any version may have written."""
    return msgspec.convert({key: value for key, value in model.items() if key != "path"}, ModelShape)
