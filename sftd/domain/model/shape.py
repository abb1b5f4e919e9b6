"""The shape of a model, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The shape of a model.

    Norms: RMSNorms lie before attention and MLP, after them (on what they add to the residual stream), or both
    (`norm_place`). `norm_offset` is added to their weights. `qk_norm`: queries and keys have norms, of each head or with
    `qk_norm_over_heads` of all heads together.

    Attention: `attention_bias` is that of the QKV projections, `output_bias` that of the output projection. Scores are
    multiplied by `attention_scale` (None: head_dim^-0.5); `score_softcap` c bounds them to c · tanh(score / c).
    `sliding_window` is the attention span in tokens, None if unlimited; `layers_without_window` have none. With
    `attention_sinks`, each head has a learned score that takes part in the softmax and has no value.

    RoPE: the first `partial_rotary_factor` of a head's dimensions are rotated, in pairs of halves, or with
    `rope_interleaved` in pairs of neighbours. `layers_without_rope` are the numbers of the layers whose queries and keys are
    not rotated. Layers with a window use `window_rope_theta` without scaling, if it is given.

    With `attention_gate`, `q_proj` also computes a gate for each element of a head's output. The layers `delta_layers` have a
    gated delta net instead of attention: a causal convolution over `delta_kernel` tokens, `delta_key_heads` heads of queries
    and keys (`delta_key_dim`) and `delta_value_heads` value heads (`delta_value_dim`); each key head serves an equal number of
    value heads.

    Embeddings and logits: embeddings are multiplied by `embedding_scale`; `logit_softcap` bounds logits as `score_softcap` does scores.

    `kv_lora_rank` > 0 selects latent attention (MLA): it is the width from which keys and values are computed. Queries are computed
    from `q_lora_rank` dimensions (0: from the hidden state). A head's queries and keys have `head_dim` dimensions, the last
    `qk_rope_head_dim` of which are rotated and, in the keys, common to all heads. Its values have `v_head_dim`.

    In a mixture of experts (MoE) every layer but `layers_without_experts` has `num_experts` experts of `moe_intermediate_size`
    units. A token is routed to `num_experts_per_tok` experts, weighted by the softmax over all experts, or over the chosen ones
    with `norm_topk_prob`. With the `router` sigmoid, the weights are sigmoids, divided by their sum with `norm_topk_prob`; the
    choice adds a bias of each expert, which is not trained, and is limited to the best `router_topk_group` of
    `router_groups` groups. Weights are multiplied by `routed_scaling_factor`. Every token also passes a shared expert of
    `shared_expert_intermediate_size` units, multiplied by a sigmoid of the token with `shared_expert_gate`.
    With `expert_bias`, the router and the products of experts have biases.

    `unsupported` lists features of config.json that the trainer does not support."""

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
    norm_place: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    qk_norm_over_heads: bool = False
    output_bias: bool = False
    attention_scale: float | None = None
    score_softcap: float | None = None
    layers_without_window: tuple[int, ...] = ()
    attention_sinks: bool = False
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    window_rope_theta: float | None = None
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    expert_bias: bool = False
    attention_gate: bool = False
    delta_layers: tuple[int, ...] = ()
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_dim: int = 0
    delta_value_dim: int = 0
    delta_kernel: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    layers_without_experts: tuple[int, ...] = ()
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_groups: int = 1
    router_topk_group: int = 1
    routed_scaling_factor: float = 1.0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    unsupported: tuple[str, ...] = ()

    def window(self, layer: int) -> int | None:
        """Attention span of layer `layer` in tokens; None if unlimited."""
        return None if layer in self.layers_without_window else self.sliding_window

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.num_hidden_layers - len(self.layers_without_experts) if self.num_experts else 0

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` is a mixture of experts."""
        return bool(self.num_experts) and layer not in self.layers_without_experts

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor)

    @property
    def query_heads(self) -> int:
        """Heads of `q_proj`: the queries, and their gates."""
        return self.num_attention_heads * (2 if self.attention_gate else 1)

    @property
    def delta_rows(self) -> tuple[int, ...]:
        """Rows that a key head of a gated delta net has in its projections: query, key, values, their gates, their betas, their
        decays."""
        shared = self.delta_value_heads // self.delta_key_heads
        values = shared * self.delta_value_dim
        return self.delta_key_dim, self.delta_key_dim, values, values, shared, shared

    @property
    def rope_type(self) -> str:
        """Type of RoPE scaling; `default` if there is none."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))


def recorded_shape(model: Mapping[str, Any]) -> ModelShape:
    """The shape in the `model` of a RunSubmitted, which any version may have written."""
    return msgspec.convert({key: value for key, value in model.items() if key != "path"}, ModelShape)
