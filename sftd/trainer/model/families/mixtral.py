"""Mixtral: Llama with experts instead of its MLP."""

from __future__ import annotations

from sftd.trainer.model.families.llama import ATTENTION
from sftd.trainer.model.families.rules import STACKED, Rule, expert_rules
from sftd.trainer.model.families.seam import TrainedFamily

_EXPERT = (
    Rule("linear_fc1.weight", ("w1.weight", "w3.weight"), "rows", STACKED),
    Rule("linear_fc2.weight", ("w2.weight",), "columns"),
)

FAMILY = TrainedFamily(
    layer_rules=lambda shape, layer, experts: [
        *ATTENTION,
        *expert_rules(shape, experts, "block_sparse_moe.", _EXPERT),
    ]
)
