"""The text model of Qwen3.5: in most layers a gated delta net; in the others attention with partial RoPE whose output is gated."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.delta.net import DeltaLayer, GatedDeltaNet
from sftd.trainer.model.families.llama import QK_NORM, dense
from sftd.trainer.model.families.rules import Join, Rule, interleave, separate
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.layer import decoder_layer


def _stacked(shape: ModelShape) -> tuple[int, ...]:
    """Rows of all queries, keys and values of a gated delta net."""
    return tuple(shape.delta_key_heads * rows for rows in shape.delta_rows[:3])


def _by_key_head(parts: list[Tensor], shape: ModelShape) -> Tensor:
    return interleave(parts, parts[0].shape[0] // shape.delta_key_dim)


def _separate_projections(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    parts = separate(whole, shape.delta_rows)
    return [torch.cat(parts[:3]), *parts[3:]]


def _separate_channels(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    return [torch.cat(separate(whole, shape.delta_rows[:3]))[:, None]]


_PROJECTIONS = Join(_by_key_head, _separate_projections, _stacked)
_CHANNELS = Join(lambda parts, shape: _by_key_head(parts, shape).squeeze(1), _separate_channels, _stacked)
# fmt: off
_DELTA_NET = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    *(rule.below("self_attention.", "linear_attn.") for rule in (
        Rule("linear_in.weight", ("in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight"), "rows", _PROJECTIONS),
        Rule("convolution", ("conv1d.weight",), "rows", _CHANNELS),
        Rule("log_decay", ("A_log",), "rows"),
        Rule("decay_bias", ("dt_bias",), "rows"),
        Rule("norm", ("norm.weight",)),
        Rule("linear_proj.weight", ("out_proj.weight",), "columns"),
    )),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
)
# fmt: on


def _layer(shape: ModelShape, number: int) -> Any:
    if number not in shape.delta_layers:
        return decoder_layer(shape)
    spec = decoder_layer(shape, DeltaLayer)
    spec.submodules.self_attention = ModuleSpec(module=GatedDeltaNet)
    return spec


_RULES, _DELTA_RULES = dense(*QK_NORM), dense(attention=_DELTA_NET)
FAMILY = TrainedFamily(
    layer_rules=lambda shape, layer, experts: (_DELTA_RULES if layer in shape.delta_layers else _RULES)(
        shape, layer, experts
    ),
    layer_spec=_layer,
)
