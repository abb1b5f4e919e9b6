"""The shape of a model, as its config.json gives it."""

from __future__ import annotations

from typing import Any

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's config.json says of its shape. `attention_bias` is on the QKV projections; `sliding_window` is how
    many tokens back attention looks, None for all.

    A mixture of experts (MoE) has `num_experts` in every layer, each of `moe_intermediate_size` units, of which a token
    takes `num_experts_per_tok`, weighted by their softmax over all experts, or, with `norm_topk_prob`, over the taken
    ones. `unsupported` names what config.json asks for that the trainer does not compute."""

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
    # No family has it, but every log does.
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    unsupported: tuple[str, ...] = ()

    @property
    def rope_type(self) -> str:
        """Name of the RoPE scaling, `default` without one."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))
