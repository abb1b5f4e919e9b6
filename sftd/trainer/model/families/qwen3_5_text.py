"""Language models of Qwen3.5 and Qwen3-Next: most layers have a gated delta net, the others gated attention with partial RoPE."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.delta.net import DeltaLayer, GatedDeltaNet
from sftd.trainer.model.families.rules import (
    Join,
    Rule,
    interleave,
    layer_rules,
    mlp_rules,
    norm_rules,
    separate,
)
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.layer import decoder_layer


def _by_key_head(parts: list[Tensor], shape: ModelShape) -> Tensor:
    return interleave(parts, parts[0].shape[0] // shape.delta_key_dim)


def _joined_rows(shape: ModelShape) -> tuple[int, ...]:
    """Rows of all queries, keys and values of a gated delta net."""
    return tuple(shape.delta_key_heads * rows for rows in shape.delta_rows[:3])


_PROJECTIONS = Join(_by_key_head, lambda whole, shape: separate(whole, shape.delta_rows))
_CHANNELS = Join(
    lambda parts, shape: _by_key_head(parts, shape).squeeze(1),
    lambda whole, shape: separate(whole[:, None], shape.delta_rows[:3]),
)
# Those of Qwen3-Next, which are ordered by key heads as `linear_in` is.
_ORDERED = Join(
    lambda parts, shape: interleave(parts, parts[0].shape[0] // sum(shape.delta_rows[:4])),
    lambda whole, shape: separate(whole, (sum(shape.delta_rows[:4]), sum(shape.delta_rows[4:]))),
)
# fmt: off
_APART = Rule("linear_in.weight", tuple(f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")), "rows", _PROJECTIONS, _joined_rows)
_TOGETHER = Rule("linear_in.weight", ("in_proj_qkvz.weight", "in_proj_ba.weight"), "rows", _ORDERED)
_OTHERS = (
    Rule("convolution", ("conv1d.weight",), "rows", _CHANNELS, _joined_rows),
    Rule("log_decay", ("A_log",), "rows"),
    Rule("decay_bias", ("dt_bias",), "rows"),
    Rule("norm", ("norm.weight",)),
    Rule("linear_proj.weight", ("out_proj.weight",), "columns"),
)
# fmt: on


def _rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
    if layer not in shape.delta_layers:
        return layer_rules(shape, layer, experts)
    projections = _TOGETHER if "qkvz" in FAMILIES[shape.architecture].fused else _APART
    net = [rule.below("self_attention.", "linear_attn.") for rule in (projections, *_OTHERS)]
    return [*norm_rules(shape), *net, *mlp_rules(shape, layer, experts)]


def _layer(shape: ModelShape, number: int) -> Any:
    if number not in shape.delta_layers:
        return decoder_layer(shape, layer=number)
    spec = decoder_layer(shape, DeltaLayer, number)
    spec.submodules.self_attention = ModuleSpec(module=GatedDeltaNet)
    return spec


FAMILY = TrainedFamily(layer_rules=_rules, layer_spec=_layer)
