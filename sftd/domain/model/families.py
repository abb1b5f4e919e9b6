"""The supported model families as data: how a config.json becomes a `ModelShape`, and which options are refused.

The trainer reads weights under the names given here (`trainer/model/families`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftd.domain.model.shape import ModelShape

_REQUIRED: Any = object()
_ORIGINAL = "original_max_position_embeddings"
_LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL)


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
        if self.switch and not config.get(self.switch):
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
    "sliding_window": Key(int, default=None),
    "attention_bias": False,
    "qk_norm": False,
}


def without_window(types: Sequence[str]) -> tuple[int, ...]:
    """The layers whose entry in `layer_types` is not `sliding_attention`."""
    return tuple(number for number, kind in enumerate(types) if kind != "sliding_attention")


def _from_window_layers(config: Mapping[str, Any]) -> list[str]:
    """Qwen's default of `layer_types`: a window from layer `max_window_layers` on."""
    full, layers = int(config.get("max_window_layers", 28)), int(config["num_hidden_layers"])
    return ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)


# Qwen's config.json has a window that is used only if the switch says so.
_SWITCHED_WINDOW = Key(int, default=None, switch="use_sliding_window")
_QWEN_WINDOWS = {
    "sliding_window": _SWITCHED_WINDOW,
    "layers_without_window": Key(without_window, ("layer_types",), default=_from_window_layers),
}
_MLP_BIAS, _ATTENTION_BIAS = Untrained("mlp_bias"), Untrained("attention_bias")
_OTHER_EXPERTS = (
    Untrained("mlp_only_layers", "dense layers between its MoE layers"),
    Untrained("decoder_sparse_step", "dense layers between its MoE layers", neutral=(1,)),
    Untrained("shared_expert_intermediate_size", "shared experts"),
    Untrained("router_jitter_noise", "router noise"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one `architecture` and `model_type`, as config.json names them.

    `fields`: differences from Llama's shape: field → `Key`, or a constant. `refused`: unsupported features of its
    config.json. `activations`, `rope_types`: the supported ones. `added(shape, tp)`: parameters per layer and
    tensor-parallel rank besides those of Llama and of the shape's options. `norms`: names of a layer's norms of hidden states. `feed_forward`: name of a layer's MLP or experts in
    the folder. `projections`: names of gate, up and down there.
    `fused`: matrices that the folder holds one below the other as one: `qkv` or `gate_up` → its name, that of QKV without `_proj`.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[Untrained, ...] = (_MLP_BIAS, _ATTENTION_BIAS)
    activations: tuple[str, ...] = ("silu",)
    rope_types: tuple[str, ...] = (
        *("default", "linear", "llama3", "yarn"),
        *("dynamic", "longrope", "proportional"),
    )
    added: Callable[[ModelShape, int], int] = lambda shape, tp: 0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    feed_forward: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: Mapping[str, str] = field(default_factory=dict)

    def shape(self, config: Mapping[str, Any], override: Mapping[str, Any]) -> ModelShape:
        """The shape of a model. `config` is its config.json with `override` already applied. Raises `KeyError`, `TypeError`,
        `ValueError`, `AttributeError` or `ArithmeticError`."""
        rope = _rope(config, override)
        if "partial_rotary_factor" not in self.fields:
            rope.pop("partial_rotary_factor", None)
        fields = {
            name: how.read(name, config) if isinstance(how, Key) else how
            for name, how in (_FIELDS | dict(self.fields)).items()
        }
        fields |= rope
        if fields["sliding_window"] is None:
            fields.pop("layers_without_window", None)
            fields.pop("window_rope_theta", None)
        return ModelShape(
            architecture=self.architecture,
            unsupported=tuple(str(option) for option in self.refused if option.is_asked(config)),
            **fields,
        )


def _every_fourth(config: Mapping[str, Any]) -> list[int]:
    """SmolLM3's default of `no_rope_layers`."""
    interval = int(config.get("no_rope_layer_interval", 4))
    return [int((number + 1) % interval != 0) for number in range(int(config["num_hidden_layers"]))]


def _windows_without_rope(config: Mapping[str, Any]) -> list[str]:
    """SmolLM3's default of `layer_types`."""
    marks = config.get("no_rope_layers") or _every_fourth(config)
    return ["full_attention" if mark else "sliding_attention" for mark in marks]


def _without(marks: Sequence[Any]) -> tuple[int, ...]:
    """The places of zeros."""
    return tuple(number for number, mark in enumerate(marks) if not mark)


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(architecture="LlamaForCausalLM", model_type="llama"),
        Family(architecture="MistralForCausalLM", model_type="mistral"),
        Family(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            fields={"attention_bias": True, **_QWEN_WINDOWS},
            refused=(_MLP_BIAS,),
        ),
        Family(
            architecture="Qwen3ForCausalLM", model_type="qwen3", fields={"qk_norm": True, **_QWEN_WINDOWS}
        ),
        Family(
            architecture="SmolLM3ForCausalLM",
            model_type="smollm3",
            fields={
                "tie_word_embeddings": Key(bool, default=True),
                "layers_without_rope": Key(_without, ("no_rope_layers",), default=_every_fourth),
                "sliding_window": _SWITCHED_WINDOW,
                "layers_without_window": Key(without_window, ("layer_types",), default=_windows_without_rope),
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
                "sliding_window": _SWITCHED_WINDOW,
                # Published configs have num_experts; configs written by transformers 5 have num_local_experts.
                "num_experts": Key(int, ("num_experts", "num_local_experts")),
                "num_experts_per_tok": Key(int, default=8),
                "moe_intermediate_size": Key(int),
                "norm_topk_prob": Key(bool, default=False),
            },
            refused=(_MLP_BIAS, _ATTENTION_BIAS, *_OTHER_EXPERTS),
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


def _rope(config: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoPE. transformers 5 writes the settings as one mapping, or as one for each type of layer, transformers 4 as two
    keys. An override takes precedence over all forms."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    of_types = {kind: dict(rope.pop(kind) or {}) for kind in _LAYER_TYPES if kind in rope}
    if of_types:
        rope = dict(of_types.get("full_attention") or of_types["sliding_attention"])
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    found: dict[str, Any] = {}
    if len(of_types) == 2:
        local = of_types["sliding_attention"]
        local_theta = float(local.pop("rope_theta", theta))
        if local != rope and _is_scaled(local):
            raise ValueError("layers with a sliding window have a RoPE scaling of their own")
        is_other = local != rope or local_theta != theta
        found["window_rope_theta"] = local_theta if is_other else None
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = float(rope["partial_rotary_factor"])
    if "rope_parameters" not in override:
        if "rope_scaling" in override:
            rope = dict(override["rope_scaling"] or {})
        theta = override.get("rope_theta", rope.pop("rope_theta", theta))
    if config.get(_ORIGINAL) and rope.get("rope_type", rope.get("type")) in ("llama3", "yarn", "longrope"):
        # Phi has it beside the scaling.
        rope[_ORIGINAL] = config[_ORIGINAL]
    return found | {"rope_theta": float(theta), "rope_scaling": rope if _is_scaled(rope) else None}


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind != "default" or bool(rope.get("llama_4_scaling_beta"))
