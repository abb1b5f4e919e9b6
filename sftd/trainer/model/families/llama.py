"""Llama, and the parts that most later families share."""

from __future__ import annotations

from collections.abc import Callable

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.families.rules import GROUPED, STACKED, Rule
from sftd.trainer.model.families.seam import TrainedFamily

# fmt: off
ATTENTION = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule("self_attention.linear_qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "rows", GROUPED),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
)
QKV_BIAS = Rule("self_attention.linear_qkv.bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "rows", GROUPED)
QK_NORM = (
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)
FEED_FORWARD = (
    Rule("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), "rows", STACKED),
    Rule("linear_fc2.weight", ("down_proj.weight",), "columns"),
)
# fmt: on


def dense(
    *more: Rule, attention: tuple[Rule, ...] = ATTENTION
) -> Callable[[ModelShape, int, range], list[Rule]]:
    """The rules of a layer with Llama's parameters, plus `more`."""
    rules = [*attention, *more, *(rule.below("mlp.", "mlp.") for rule in FEED_FORWARD)]
    return lambda shape, layer, experts: rules


FAMILY = TrainedFamily(layer_rules=dense())
