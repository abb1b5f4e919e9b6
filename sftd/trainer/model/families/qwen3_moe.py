"""Qwen3-MoE: Qwen3 with experts instead of its MLP."""

from __future__ import annotations

from sftd.trainer.model.families.llama import ATTENTION, FEED_FORWARD, QK_NORM
from sftd.trainer.model.families.rules import expert_rules
from sftd.trainer.model.families.seam import TrainedFamily

FAMILY = TrainedFamily(
    layer_rules=lambda shape, layer, experts: [
        *ATTENTION,
        *QK_NORM,
        *expert_rules(shape, experts, "mlp.", FEED_FORWARD),
    ]
)
