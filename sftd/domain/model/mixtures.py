"""The supported families of mixtures of experts, see `families`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftd.domain.model.family import (
    ATTENTION_BIAS,
    MLP_BIAS,
    SWITCHED_WINDOW,
    Family,
    Key,
    Untrained,
    full_attention,
)

_OTHER_EXPERTS = (
    Untrained("shared_expert_intermediate_size", "shared experts"),
    Untrained("router_jitter_noise", "router noise"),
)


def _by_sparse_step(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The dense layers of Qwen's mixtures of experts."""
    dense, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step", 1))
    layers = range(int(config["num_hidden_layers"]))
    return tuple(number for number in layers if number in dense or (number + 1) % step)


BY_SPARSE_STEP = Key(_by_sparse_step, ("mlp_only_layers", "decoder_sparse_step"), is_joint=True)


def _shared_units(config: Mapping[str, Any]) -> int:
    return int(config["moe_intermediate_size"]) * int(config.get("n_shared_experts", 1))


def _key_width(config: Mapping[str, Any]) -> int:
    return int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])


def _first_layers(count: Any) -> tuple[int, ...]:
    return tuple(range(int(count)))


def _dense_of(kinds: Sequence[str]) -> tuple[int, ...]:
    return tuple(number for number, kind in enumerate(kinds) if kind == "dense")


# What DeepSeek-V3 and the families after it share.
_SIGMOID_EXPERTS: dict[str, Any] = {
    "num_experts": Key(int, ("n_routed_experts", "num_local_experts")),
    "num_experts_per_tok": Key(int, default=8),
    "moe_intermediate_size": Key(int),
    "norm_topk_prob": Key(bool, default=True),
    "router": "sigmoid",
    "router_groups": Key(int, ("n_group",), default=1),
    "router_topk_group": Key(int, ("topk_group",), default=1),
    "routed_scaling_factor": Key(float, default=1.0),
    "shared_expert_intermediate_size": Key(_shared_units, ("n_shared_experts",), is_joint=True),
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": Key(int, ("num_attention_heads",)),
    "kv_lora_rank": Key(int),
    "q_lora_rank": Key(int, default=0),
    "qk_rope_head_dim": Key(int),
    "v_head_dim": Key(int),
    "head_dim": Key(_key_width, ("qk_nope_head_dim", "qk_rope_head_dim"), is_joint=True),
    "rope_interleaved": Key(bool, ("rope_interleave",), default=True),
}
_OTHER_ROUTERS = (
    Untrained("scoring_func", "other scores of the router", neutral=(None, "sigmoid")),
    Untrained("topk_method", "another choice of experts", neutral=(None, "noaux_tc")),
    Untrained("moe_layer_freq", "dense layers between its MoE layers", neutral=(None, 1)),
)


def _alternating(config: Mapping[str, Any]) -> list[str]:
    """Qwen2-MoE's default of `layer_types`: a window in every other layer below `max_window_layers`."""
    below = int(config.get("max_window_layers", 28))
    return [
        "full_attention" if number % 2 or number >= below else "sliding_attention"
        for number in range(int(config["num_hidden_layers"]))
    ]


MIXTURES = (
    Family(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        models="Mixtral 8x7B and 8x22B",
        fields={
            "num_experts": Key(int, ("num_local_experts",)),
            "num_experts_per_tok": Key(int, default=2),
            "moe_intermediate_size": Key(int, ("intermediate_size",)),
        },
        refused=(MLP_BIAS, ATTENTION_BIAS, *_OTHER_EXPERTS),
        feed_forward="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    Family(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        fields={
            "qk_norm": True,
            "sliding_window": SWITCHED_WINDOW,
            # Published configs have num_experts; configs written by transformers 5 have num_local_experts.
            "num_experts": Key(int, ("num_experts", "num_local_experts")),
            "num_experts_per_tok": Key(int, default=8),
            "moe_intermediate_size": Key(int),
            "norm_topk_prob": Key(bool, default=False),
            "layers_without_experts": BY_SPARSE_STEP,
        },
        refused=(MLP_BIAS, ATTENTION_BIAS, *_OTHER_EXPERTS),
    ),
    Family(
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        models="Qwen1.5-MoE, Qwen2-57B-A14B",
        fields={
            "attention_bias": Key(bool, ("qkv_bias",), default=True),
            "num_experts": Key(int, ("num_experts", "num_local_experts")),
            "num_experts_per_tok": Key(int, default=4),
            "moe_intermediate_size": Key(int),
            "norm_topk_prob": Key(bool, default=False),
            "layers_without_experts": BY_SPARSE_STEP,
            "sliding_window": SWITCHED_WINDOW,
            "layers_without_window": Key(
                full_attention, ("layer_types",), default=_alternating, also=("max_window_layers",)
            ),
            "shared_expert_intermediate_size": Key(int),
            "shared_expert_gate": True,
        },
        refused=(MLP_BIAS,),
        shared_expert="shared_expert",
    ),
    Family(
        architecture="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        models="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
        fields=_SIGMOID_EXPERTS
        | {
            "attention_bias": Key(bool, default=False),
            "qk_norm": Key(bool, ("use_qk_norm",), default=False),
            "partial_rotary_factor": Key(float, default=0.5),
            "layers_without_experts": Key(_first_layers, ("first_k_dense_replace",), default=1),
        },
        refused=(MLP_BIAS, *_OTHER_ROUTERS),
    ),
    Family(
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        models="Moonlight, DeepSeek V3 and R1",
        fields=_SIGMOID_EXPERTS
        | _LATENT
        | {"layers_without_experts": Key(_first_layers, ("first_k_dense_replace",), default=3)},
        refused=(MLP_BIAS, ATTENTION_BIAS, *_OTHER_ROUTERS),
    ),
    Family(
        architecture="Glm4MoeLiteForCausalLM",
        model_type="glm4_moe_lite",
        models="GLM-4.7-Flash",
        fields=_SIGMOID_EXPERTS
        | _LATENT
        | {"layers_without_experts": Key(_dense_of, ("mlp_layer_types",), default=("dense",))},
        refused=(MLP_BIAS, ATTENTION_BIAS, *_OTHER_ROUTERS),
    ),
)
