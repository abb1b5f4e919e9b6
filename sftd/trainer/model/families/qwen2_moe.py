"""Qwen2-MoE: Qwen2 with experts, and a gated one that every token passes."""

from __future__ import annotations

from sftd.trainer.model.families.llama import ATTENTION, QKV_BIAS, mixed
from sftd.trainer.model.families.seam import TrainedFamily

FAMILY = TrainedFamily(
    layer_rules=mixed(
        lambda shape: (*ATTENTION, *([QKV_BIAS] if shape.attention_bias else [])), "shared_expert"
    )
)
