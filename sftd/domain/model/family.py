"""A model family as data: how a config.json becomes a `ModelShape`, and which options are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftd.domain.model.shape import ModelShape

_REQUIRED: Any = object()
_ORIGINAL = "original_max_position_embeddings"
# Keys of config.json about RoPE, of transformers 5 and 4.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL)


@dataclass(frozen=True)
class Key:
    """How a field of `ModelShape` is read from config.json: the first of the keys `names` (default: the field's name) with a
    value, converted by `kind`; else `default`, which may be a function of config.json. If the key `switch` is false, the
    field is None. With `is_joint`, `kind` takes config.json, for several keys together. `also`: further keys that `default` reads."""

    kind: Callable[[Any], Any]
    names: tuple[str, ...] = ()
    default: Any = _REQUIRED
    switch: str = ""
    is_joint: bool = False
    also: tuple[str, ...] = ()

    def read(self, name: str, config: Mapping[str, Any]) -> Any:
        """The value of the field `name`. Raises `KeyError` if it is missing, and the errors of `kind`."""
        if self.switch and not config.get(self.switch):
            return None
        if self.is_joint:
            return self.kind(config)
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


def full_attention(types: Sequence[str]) -> tuple[int, ...]:
    """The layers without a window in config.json's `layer_types`."""
    return tuple(number for number, kind in enumerate(types) if kind != "sliding_attention")


# The fields of Llama's config.json, which most later families share.
LLAMA: dict[str, Any] = {
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
# Qwen's config.json has a window that is used only if the switch says so.
SWITCHED_WINDOW = Key(int, default=None, switch="use_sliding_window")
MLP_BIAS, ATTENTION_BIAS = Untrained("mlp_bias"), Untrained("attention_bias")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    `architecture`, `model_type`: its names in config.json.
    `models`: what people call its models.
    `fields`: differences from Llama's shape, field → `Key` or a constant.
    `refused`: unsupported features of its config.json.
    `also_inside`: other `model_type`s of the same language model inside a vision-language model.
    `activations`: the supported activations.
    `rope_types`: the supported RoPE scalings.
    `added(shape, tp)`: parameters per layer and tensor-parallel rank besides those of Llama and of the shape's options.
    `rope_theta`: default of the RoPE base.
    `norms`: names of a layer's norms of hidden states, in the folder.
    `feed_forward`: name of a layer's MLP or experts, in the folder.
    `projections`: names of gate, up and down under `feed_forward`.
    `shared_expert`: name of the shared expert under `feed_forward`.
    `fused`: matrices stacked into one tensor of the folder (`qkv`, `gate_up`; delta nets: `qkvz`, `ba`) → its name.
    `joined_experts`: whether a tensor of the folder holds a matrix of all experts of a layer, as in gpt-oss.
    """

    architecture: str
    model_type: str
    models: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[Untrained, ...] = (MLP_BIAS, ATTENTION_BIAS)
    also_inside: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    rope_types: tuple[str, ...] = (
        *("default", "linear", "llama3", "yarn"),
        *("dynamic", "longrope", "proportional"),
    )
    added: Callable[[ModelShape, int], int] = lambda shape, tp: 0
    rope_theta: float = 10000.0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    feed_forward: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "shared_experts"
    fused: Mapping[str, str] = field(default_factory=dict)
    joined_experts: bool = False

    def config_keys(self) -> list[str]:
        """The keys of config.json that the family reads beside those of RoPE."""
        read = [
            key
            for name, how in (LLAMA | dict(self.fields)).items()
            if isinstance(how, Key)
            for key in (*(how.names or (name,)), how.switch, *how.also)
        ]
        return [*filter(None, read), *(option.key for option in self.refused)]

    def shape(self, config: Mapping[str, Any], override: Mapping[str, Any]) -> ModelShape:
        """The shape of a model. `config` is its config.json with `override` already applied. Raises `KeyError`, `TypeError`,
        `ValueError`, `AttributeError` or `ArithmeticError`."""
        fields = {
            name: how.read(name, config) if isinstance(how, Key) else how
            for name, how in (LLAMA | dict(self.fields)).items()
        }
        if fields["sliding_window"] is None:
            fields.pop("layers_without_window", None)
            fields.pop("window_rope_theta", None)
        unsupported = [str(option) for option in self.refused if option.is_asked(config)]
        return ModelShape(
            architecture=self.architecture,
            unsupported=tuple(unsupported),
            **fields | _rope(config, override, fields.get("window_rope_theta"), self.rope_theta),
        )


def _rope(
    config: Mapping[str, Any], override: Mapping[str, Any], window_theta: float | None, default: float
) -> dict[str, Any]:
    """The fields of `ModelShape` about RoPE. transformers 5 writes its settings as one mapping, or as one for each type of layer;
    transformers 4 as keys of their own. An override takes precedence over all forms. `window_theta`: what the keys of transformers 4
    say about layers with a window."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    of_windows: dict[str, Any] | None = rope.get("sliding_attention")
    if any(kind in rope for kind in ("full_attention", "sliding_attention")):
        rope = dict(rope.get("full_attention") or of_windows or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", default))
    if of_windows is not None:
        other = {"rope_theta": theta} | of_windows
        window_theta = None if other == rope | {"rope_theta": theta} else float(other["rope_theta"])
        if window_theta is not None and _is_scaled(other):
            raise ValueError("sftd does not support a RoPE scaling of its own for sliding-window layers")
    factor = rope.get("partial_rotary_factor")
    if "rope_parameters" not in override:
        if "rope_scaling" in override:
            rope = dict(override["rope_scaling"] or {})
        theta = override.get("rope_theta", rope.pop("rope_theta", theta))
    kind = rope.get("rope_type", rope.get("type"))
    if config.get(_ORIGINAL) and kind in ("llama3", "yarn", "longrope"):
        # Phi has it beside the scaling.
        rope[_ORIGINAL] = config[_ORIGINAL]
    found = {"rope_theta": float(theta), "window_rope_theta": window_theta}
    if factor is not None and kind != "proportional":
        found["partial_rotary_factor"] = float(factor)
        rope.pop("partial_rotary_factor", None)
    return found | {"rope_scaling": rope if _is_scaled(rope) else None}


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return bool(kind != "default" or rope.get("llama_4_scaling_beta"))
