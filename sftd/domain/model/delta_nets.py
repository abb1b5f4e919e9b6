"""The supported families with gated delta nets, see `families`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftd.domain.model.family import Family, Key
from sftd.domain.model.mixtures import BY_SPARSE_STEP


def _three_of_four(config: Mapping[str, Any]) -> list[str]:
    """The default of `layer_types`."""
    interval = int(config.get("full_attention_interval", 4))
    return [
        "full_attention" if (number + 1) % interval == 0 else "linear_attention"
        for number in range(int(config["num_hidden_layers"]))
    ]


def _linear(types: Sequence[str]) -> tuple[int, ...]:
    """The places of layers without attention in `layer_types`."""
    return tuple(number for number, kind in enumerate(types) if kind == "linear_attention")


_FIELDS: dict[str, Any] = {
    "head_dim": Key(int, default=256),
    "qk_norm": True,
    "norm_offset": 1.0,
    "attention_gate": True,
    "partial_rotary_factor": Key(float, default=0.25),
    "delta_layers": Key(_linear, ("layer_types",), default=_three_of_four, also=("full_attention_interval",)),
    "delta_key_heads": Key(int, ("linear_num_key_heads",), default=16),
    "delta_value_heads": Key(int, ("linear_num_value_heads",), default=32),
    "delta_key_dim": Key(int, ("linear_key_head_dim",), default=128),
    "delta_value_dim": Key(int, ("linear_value_head_dim",), default=128),
    "delta_kernel": Key(int, ("linear_conv_kernel_dim",), default=4),
}
_EXPERTS: dict[str, Any] = {
    "num_experts": Key(int, ("num_experts", "num_local_experts")),
    "num_experts_per_tok": Key(int),
    "moe_intermediate_size": Key(int),
    "shared_expert_intermediate_size": Key(int),
    "shared_expert_gate": True,
}

DELTA_NETS = (
    Family(
        architecture="Qwen3_5ForCausalLM",
        model_type="qwen3_5_text",
        models="the language model of Qwen3.5 and 3.6, dense",
        fields=_FIELDS,
    ),
    Family(
        architecture="Qwen3_5MoeForCausalLM",
        model_type="qwen3_5_moe_text",
        models="the language model of Qwen3.5 and 3.6 with experts",
        # There is no dense layer.
        fields=_FIELDS | _EXPERTS | {"intermediate_size": Key(int, ("moe_intermediate_size",))},
        shared_expert="shared_expert",
    ),
    Family(
        architecture="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        models="Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
        fields=_FIELDS
        | _EXPERTS
        | {"norm_topk_prob": Key(bool, default=True), "layers_without_experts": BY_SPARSE_STEP},
        shared_expert="shared_expert",
        fused={"qkvz": "in_proj_qkvz", "ba": "in_proj_ba"},
    ),
)
