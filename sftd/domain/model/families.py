"""The supported model families as data: how a config.json becomes a `ModelShape`, and which options are refused.

The weights and layers of a family are in `trainer/model/families`, in the module named as its `model_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftd.domain.model.shape import ModelShape

_REQUIRED: Any = object()
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class Key:
    """How a field of `ModelShape` is read from config.json: the first of the keys `names` (default: the field's name) with a
    value, converted by `kind`; else `default`, which may be a function of config.json. If the key `switch` is false, the
    field is None."""

    kind: Callable[[Any], Any]
    names: tuple[str, ...] = ()
    default: Any = _REQUIRED
    switch: str = ""

    def read(self, name: str, config: Mapping[str, Any]) -> Any:
        """The value of the field `name`. Raises `KeyError` if it is missing, and the errors of `kind`."""
        if self.switch and not config.get(self.switch, True):
            return None
        names = self.names or (name,)
        value = next((config[key] for key in names if config.get(key) is not None), self.default)
        if value is _REQUIRED:
            raise KeyError(names[0])
        if callable(value):
            value = value(config)
        return None if value is None else self.kind(value)


@dataclass(frozen=True)
class Untrained:
    """A key of config.json that requests the unsupported feature `what` (default: the key), unless it is absent or has one of
    the `neutral` values."""

    key: str
    what: str = ""
    neutral: tuple[Any, ...] = (None, False, 0, [])

    def is_asked(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json requests the feature."""
        return self.key in config and config[self.key] not in self.neutral

    def __str__(self) -> str:
        return f"{self.what} ({self.key})" if self.what else self.key


# The fields of Llama's config.json, which most later families share.
_FIELDS: dict[str, Any] = {
    "hidden_size": Key(int),
    "intermediate_size": Key(int),
    "num_hidden_layers": Key(int),
    "num_attention_heads": Key(int),
    "num_key_value_heads": Key(int, default=lambda config: config["num_attention_heads"]),
    "head_dim": Key(
        int, default=lambda config: int(config["hidden_size"]) // int(config["num_attention_heads"])
    ),
    "vocab_size": Key(int),
    "max_position_embeddings": Key(int, default=2048),
    "rms_norm_eps": Key(float, default=1e-6),
    "tie_word_embeddings": Key(bool, default=False),
    "hidden_act": Key(str, default="silu"),
    # Qwen uses the window of its config.json only if use_sliding_window is true; Mistral has no such key.
    "sliding_window": Key(int, default=None, switch="use_sliding_window"),
    "attention_bias": False,
    "qk_norm": False,
}
_MLP_BIAS, _ATTENTION_BIAS = Untrained("mlp_bias"), Untrained("attention_bias")
_OTHER_EXPERTS = (
    Untrained("shared_expert_intermediate_size", "shared experts"),
    Untrained("router_jitter_noise", "router noise"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one `architecture` and `model_type`, as config.json names them.

    `fields`: differences from Llama's shape: field → `Key`, a function of config.json, or a constant. `refused`: unsupported features of its
    config.json. `activations`, `rope_types`: the supported ones. `added(shape, tp)`: parameters per layer and
    tensor-parallel rank besides those of Llama and of the shape's options. `norms`: names of a layer's norms of hidden states. `feed_forward`: name of a layer's MLP or experts in
    the folder. `projections`: names of gate, up and down there. `shared_expert`: name of the shared expert below that.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[Untrained, ...] = (_MLP_BIAS, _ATTENTION_BIAS)
    activations: tuple[str, ...] = ("silu",)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    added: Callable[[ModelShape, int], int] = lambda shape, tp: 0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    feed_forward: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "shared_experts"

    def shape(self, config: Mapping[str, Any], override: Mapping[str, Any]) -> ModelShape:
        """The shape of a model. `config` is its config.json with `override` already applied. Raises `KeyError`, `TypeError`,
        `ValueError`, `AttributeError` or `ArithmeticError`."""
        theta, scaling = _rope(config, override)
        fields = {
            name: how.read(name, config) if isinstance(how, Key) else how(config) if callable(how) else how
            for name, how in (_FIELDS | dict(self.fields)).items()
        }
        return ModelShape(
            architecture=self.architecture,
            rope_theta=theta,
            rope_scaling=scaling,
            unsupported=tuple(str(option) for option in self.refused if option.is_asked(config)),
            **fields,
        )


def _every_fourth(config: Mapping[str, Any]) -> list[int]:
    """SmolLM3's default of `no_rope_layers`."""
    interval = int(config.get("no_rope_layer_interval", 4))
    return [int((number + 1) % interval != 0) for number in range(int(config["num_hidden_layers"]))]


def _by_sparse_step(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The dense layers of Qwen's mixtures of experts."""
    dense, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step", 1))
    layers = range(int(config["num_hidden_layers"]))
    return tuple(number for number in layers if number in dense or (number + 1) % step)


def _first_layers(count: Any) -> tuple[int, ...]:
    return tuple(range(int(count)))


def _dense_of(kinds: Sequence[str]) -> tuple[int, ...]:
    return tuple(number for number, kind in enumerate(kinds) if kind == "dense")


def _rotated_share(config: Mapping[str, Any]) -> float:
    """GLM's share of a head's dimensions that are rotated."""
    rope = config.get("rope_parameters") or config
    return float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)))


def _without(marks: Sequence[Any]) -> tuple[int, ...]:
    """The places of zeros."""
    return tuple(number for number, mark in enumerate(marks) if not mark)


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
    "shared_expert_intermediate_size": lambda config: (
        int(config["moe_intermediate_size"]) * int(config.get("n_shared_experts") or 0)
    ),
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": lambda config: int(config["num_attention_heads"]),
    "kv_lora_rank": Key(int),
    "q_lora_rank": Key(int, default=0),
    "qk_rope_head_dim": Key(int),
    "v_head_dim": Key(int),
    "head_dim": lambda config: int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]),
    "rope_interleaved": Key(bool, ("rope_interleave",), default=True),
}
_OTHER_ROUTERS = (
    Untrained("scoring_func", "other scores of the router", neutral=(None, "sigmoid")),
    Untrained("topk_method", "another choice of experts", neutral=(None, "noaux_tc")),
    Untrained("moe_layer_freq", "dense layers between its MoE layers", neutral=(None, 1)),
)


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(architecture="LlamaForCausalLM", model_type="llama"),
        Family(architecture="MistralForCausalLM", model_type="mistral"),
        Family(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            fields={"attention_bias": True},
            refused=(_MLP_BIAS,),
        ),
        Family(architecture="Qwen3ForCausalLM", model_type="qwen3", fields={"qk_norm": True}),
        Family(
            architecture="SmolLM3ForCausalLM",
            model_type="smollm3",
            fields={
                "tie_word_embeddings": Key(bool, default=True),
                "layers_without_rope": Key(_without, ("no_rope_layers",), default=_every_fourth),
            },
        ),
        Family(
            architecture="MixtralForCausalLM",
            model_type="mixtral",
            fields={
                "num_experts": Key(int, ("num_local_experts",)),
                "num_experts_per_tok": Key(int, default=2),
                "moe_intermediate_size": Key(int, ("intermediate_size",)),
            },
            refused=(_MLP_BIAS, _ATTENTION_BIAS, *_OTHER_EXPERTS),
            feed_forward="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
        Family(
            architecture="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            fields={
                "qk_norm": True,
                # Published configs have num_experts; configs written by transformers 5 have num_local_experts.
                "num_experts": Key(int, ("num_experts", "num_local_experts")),
                "num_experts_per_tok": Key(int, default=8),
                "moe_intermediate_size": Key(int),
                "norm_topk_prob": Key(bool, default=False),
                "layers_without_experts": _by_sparse_step,
            },
            refused=(_MLP_BIAS, _ATTENTION_BIAS, *_OTHER_EXPERTS),
        ),
        Family(
            architecture="Qwen2MoeForCausalLM",
            model_type="qwen2_moe",
            fields={
                "attention_bias": Key(bool, ("qkv_bias",), default=True),
                "num_experts": Key(int, ("num_experts", "num_local_experts")),
                "num_experts_per_tok": Key(int, default=4),
                "moe_intermediate_size": Key(int),
                "norm_topk_prob": Key(bool, default=False),
                "layers_without_experts": _by_sparse_step,
                "shared_expert_intermediate_size": Key(int),
                "shared_expert_gate": True,
            },
            refused=(_MLP_BIAS,),
            shared_expert="shared_expert",
        ),
        Family(
            architecture="Glm4MoeForCausalLM",
            model_type="glm4_moe",
            fields=_SIGMOID_EXPERTS
            | {
                "attention_bias": Key(bool, default=False),
                "qk_norm": Key(bool, ("use_qk_norm",), default=False),
                "partial_rotary_factor": _rotated_share,
                "layers_without_experts": Key(_first_layers, ("first_k_dense_replace",), default=1),
            },
            refused=(_MLP_BIAS, *_OTHER_ROUTERS),
        ),
        Family(
            architecture="DeepseekV3ForCausalLM",
            model_type="deepseek_v3",
            fields=_SIGMOID_EXPERTS
            | _LATENT
            | {"layers_without_experts": Key(_first_layers, ("first_k_dense_replace",), default=3)},
            refused=(_MLP_BIAS, _ATTENTION_BIAS, *_OTHER_ROUTERS),
        ),
        Family(
            architecture="Glm4MoeLiteForCausalLM",
            model_type="glm4_moe_lite",
            fields=_SIGMOID_EXPERTS
            | _LATENT
            | {"layers_without_experts": Key(_dense_of, ("mlp_layer_types",), default=("dense",))},
            refused=(_MLP_BIAS, _ATTENTION_BIAS, *_OTHER_ROUTERS),
        ),
    )
}


def keys_read() -> list[str]:
    """The keys of config.json that at least one family reads. An override of any other key would have no effect."""
    names = ["architectures", *ROPE_KEYS]
    for family in FAMILIES.values():
        for name, how in (_FIELDS | dict(family.fields)).items():
            if isinstance(how, Key):
                names += [*(how.names or (name,)), *([how.switch] if how.switch else [])]
        names += [option.key for option in family.refused]
    return list(dict.fromkeys(names))


def _rope(config: Mapping[str, Any], override: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None). transformers 5 writes RoPE settings as one mapping, transformers 4 as two keys. An override
    takes precedence over both forms."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_parameters" not in override:
        if "rope_scaling" in override:
            rope = dict(override["rope_scaling"] or {})
        theta = override.get("rope_theta", rope.pop("rope_theta", theta))
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return float(theta), rope if is_scaled else None
