"""Llama, and the parts that most later families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.families.rules import GROUPED, STACKED, Rule, expert_rules
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


def dense(*more: Rule) -> Callable[[ModelShape, int, range], list[Rule]]:
    """The rules of a layer with Llama's parameters, plus `more`."""
    rules = [*ATTENTION, *more, *(rule.below("mlp.", "mlp.") for rule in FEED_FORWARD)]
    return lambda shape, layer, experts: rules


def mixed(
    attention: Callable[[ModelShape], Sequence[Rule]], shared: str = ""
) -> Callable[[ModelShape, int, range], list[Rule]]:
    """The rules of a model with experts in some layers and Llama's MLP in the others. `shared`: name of the shared expert."""

    def rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
        if shape.has_experts(layer):
            below = expert_rules(shape, experts, "mlp.", FEED_FORWARD, shared)
        else:
            below = [rule.below("mlp.", "mlp.") for rule in FEED_FORWARD]
        return [*attention(shape), *below]

    return rules


FAMILY = TrainedFamily(layer_rules=dense())
