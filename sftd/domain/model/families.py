"""The supported model families. The trainer reads weights under the names given here (`trainer/model/families`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sftd.domain.model.delta_nets import DELTA_NETS
from sftd.domain.model.family import (
    ATTENTION_BIAS,
    MLP_BIAS,
    ROPE_KEYS,
    SWITCHED_WINDOW,
    Family,
    Key,
    Untrained,
    full_attention,
)
from sftd.domain.model.mixtures import MIXTURES


def _every_fourth(config: Mapping[str, Any]) -> list[int]:
    """SmolLM3's default of `no_rope_layers`."""
    interval = int(config.get("no_rope_layer_interval", 4))
    return [int((number + 1) % interval != 0) for number in range(int(config["num_hidden_layers"]))]


def _without(marks: Sequence[Any]) -> tuple[int, ...]:
    """The places of zeros."""
    return tuple(number for number, mark in enumerate(marks) if not mark)


def _unless_null(key: str, default: float) -> Callable[[Mapping[str, Any]], float | None]:
    """The default, except that a null in config.json means None."""
    return lambda config: None if key in config else default


def _root(number: Any) -> float:
    return math.sqrt(float(number))


def _rsqrt(number: Any) -> float:
    return math.pow(float(number), -0.5)


def _layers_without_window(interval: int) -> Key:
    """Each `interval`th layer has none, unless config.json says otherwise."""

    def default(config: Mapping[str, Any]) -> list[str]:
        every = int(config.get("sliding_window_pattern", interval))
        kinds = ["sliding_attention"] * (every - 1) + ["full_attention"]
        return [kinds[number % every] for number in range(int(config["num_hidden_layers"]))]

    return Key(full_attention, ("layer_types",), default=default, also=("sliding_window_pattern",))


def _from_window_layers(config: Mapping[str, Any]) -> list[str]:
    """Qwen's default of `layer_types`: a window from layer `max_window_layers` on."""
    full, layers = int(config.get("max_window_layers", 28)), int(config["num_hidden_layers"])
    return ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)


def _windows_without_rope(config: Mapping[str, Any]) -> list[str]:
    """SmolLM3's default of `layer_types`."""
    marks = config.get("no_rope_layers") or _every_fourth(config)
    return ["full_attention" if mark else "sliding_attention" for mark in marks]


_QWEN_WINDOWS = {
    "sliding_window": SWITCHED_WINDOW,
    "layers_without_window": Key(
        full_attention, ("layer_types",), default=_from_window_layers, also=("max_window_layers",)
    ),
}
_GEMMA: dict[str, Any] = {
    "hidden_act": Key(str, ("hidden_activation", "hidden_act"), default="gelu_pytorch_tanh"),
    "tie_word_embeddings": Key(bool, default=True),
    "head_dim": Key(int, default=256),
    "norm_place": "both",
    "norm_offset": 1.0,
    "attention_scale": Key(_rsqrt, ("query_pre_attn_scalar",), default=256),
    "embedding_scale": Key(_root, ("hidden_size",)),
    "sliding_window": Key(int, default=4096),
}
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GEMMA_REFUSED = (ATTENTION_BIAS, Untrained("use_bidirectional_attention"))
_GELU = ("gelu_pytorch_tanh",)
_OLMO: dict[str, Any] = {
    "norm_place": "after",
    "qk_norm": True,
    "qk_norm_over_heads": True,
    "rms_norm_eps": Key(float, default=1e-5),
}
_OLMO_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            model_type="llama",
            models="Llama 2, 3, 3.1, 3.2 and 3.3, SmolLM2, TinyLlama, Yi 1.5",
        ),
        Family(
            architecture="MistralForCausalLM",
            model_type="mistral",
            models="Mistral 7B, Mistral Nemo, Mistral Small 2501",
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            models="Qwen2, Qwen2.5, QwQ",
            fields={"attention_bias": True, **_QWEN_WINDOWS},
            refused=(MLP_BIAS,),
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            models="Qwen3 0.6B to 32B",
            also_inside=("qwen3_vl_text",),
            fields={"qk_norm": True, **_QWEN_WINDOWS},
        ),
        Family(
            architecture="SmolLM3ForCausalLM",
            model_type="smollm3",
            models="SmolLM3 3B",
            fields={
                "tie_word_embeddings": Key(bool, default=True),
                "layers_without_rope": Key(
                    _without, ("no_rope_layers",), default=_every_fourth, also=("no_rope_layer_interval",)
                ),
                "sliding_window": SWITCHED_WINDOW,
                "layers_without_window": Key(full_attention, ("layer_types",), default=_windows_without_rope),
            },
        ),
        Family(
            architecture="Gemma2ForCausalLM",
            model_type="gemma2",
            models="Gemma 2",
            fields=_GEMMA
            | {
                "score_softcap": Key(
                    float, ("attn_logit_softcapping",), default=_unless_null("attn_logit_softcapping", 50.0)
                ),
                "logit_softcap": Key(
                    float, ("final_logit_softcapping",), default=_unless_null("final_logit_softcapping", 30.0)
                ),
                "layers_without_window": _layers_without_window(2),
            },
            refused=_GEMMA_REFUSED,
            activations=_GELU,
            norms=_GEMMA_NORMS,
        ),
        Family(
            architecture="Gemma3ForCausalLM",
            model_type="gemma3_text",
            models="Gemma 3 270M and 1B",
            fields=_GEMMA
            | {
                "qk_norm": True,
                "score_softcap": Key(float, ("attn_logit_softcapping",), default=None),
                "logit_softcap": Key(float, ("final_logit_softcapping",), default=None),
                "layers_without_window": _layers_without_window(6),
                "window_rope_theta": Key(float, ("rope_local_base_freq",), default=10000.0),
                # The models that see images leave them out.
                "num_attention_heads": Key(int, default=8),
                "num_key_value_heads": Key(int, default=4),
                "vocab_size": Key(int, default=262208),
                "max_position_embeddings": Key(int, default=131072),
            },
            refused=_GEMMA_REFUSED,
            activations=_GELU,
            rope_theta=1000000.0,
            norms=_GEMMA_NORMS,
        ),
        Family(
            architecture="Olmo2ForCausalLM",
            model_type="olmo2",
            models="OLMo 2",
            fields=_OLMO,
            rope_theta=500000.0,
            norms=_OLMO_NORMS,
        ),
        Family(
            architecture="Olmo3ForCausalLM",
            model_type="olmo3",
            models="OLMo 3",
            fields=_OLMO
            | {
                "sliding_window": Key(int, default=4096),
                "layers_without_window": _layers_without_window(4),
                "window_rope_theta": Key(float, ("rope_theta",), default=500000.0),
            },
            rope_theta=500000.0,
            norms=_OLMO_NORMS,
        ),
        Family(
            architecture="Glm4ForCausalLM",
            model_type="glm4",
            models="GLM-4-0414, GLM-Z1",
            fields={
                "attention_bias": Key(bool, default=True),
                "norm_place": "both",
                "partial_rotary_factor": Key(float, default=0.5),
                "rope_interleaved": True,
                "rms_norm_eps": Key(float, default=1.5625e-7),
            },
            refused=(MLP_BIAS,),
            norms=(
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            ),
            fused={"gate_up": "gate_up_proj"},
        ),
        Family(
            architecture="Phi3ForCausalLM",
            model_type="phi3",
            models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
            fields={
                "partial_rotary_factor": Key(float, default=1.0),
                "rms_norm_eps": Key(float, default=1e-5),
            },
            refused=(
                MLP_BIAS,
                ATTENTION_BIAS,
                *(Untrained(f"{part}_pdrop", "dropout") for part in ("resid", "embd")),
            ),
            rope_types=("default", "longrope"),
            fused={"qkv": "qkv_proj", "gate_up": "gate_up_proj"},
        ),
        Family(
            architecture="Ministral3ForCausalLM",
            model_type="ministral3",
            models="the language model of Ministral 3",
            fields={"rms_norm_eps": Key(float, default=1e-5)},
            rope_theta=1000000.0,
        ),
        Family(
            architecture="MinistralForCausalLM",
            model_type="ministral",
            models="Ministral 8B",
            fields={
                "sliding_window": Key(int, default=4096),
                "layers_without_window": Key(full_attention, ("layer_types",), default=()),
            },
        ),
        Family(
            architecture="GptOssForCausalLM",
            model_type="gpt_oss",
            models="gpt-oss 20B and 120B",
            fields={
                "attention_bias": True,
                "output_bias": True,
                "attention_sinks": True,
                "hidden_act": "clamped_swiglu",
                "sliding_window": Key(int, default=128),
                "layers_without_window": _layers_without_window(2),
                "rms_norm_eps": Key(float, default=1e-5),
                "num_experts": Key(int, ("num_local_experts", "num_experts")),
                "num_experts_per_tok": Key(int, default=4),
                "moe_intermediate_size": Key(int, ("intermediate_size",)),
                "expert_bias": True,
            },
            refused=(
                Untrained("attention_bias", "attention without biases", neutral=(None, True)),
                Untrained("swiglu_alpha", "another activation", neutral=(None, 1.702)),
                Untrained("swiglu_limit", "another activation", neutral=(None, 7.0)),
            ),
            activations=("clamped_swiglu",),
            rope_theta=150000.0,
            joined_experts=True,
        ),
        *DELTA_NETS,
        *MIXTURES,
    )
}


def keys_read() -> list[str]:
    """The keys of config.json that at least one family reads. An override of any other key would have no effect."""
    read = (key for family in FAMILIES.values() for key in family.config_keys())
    return list(dict.fromkeys(["architectures", *ROPE_KEYS, *read]))
