"""GLM-4.5: attention with optional biases and norms of queries and keys; experts with a sigmoid router after the first layers."""

from __future__ import annotations

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.families.llama import ATTENTION, QK_NORM, QKV_BIAS, mixed
from sftd.trainer.model.families.rules import Rule
from sftd.trainer.model.families.seam import TrainedFamily


def _attention(shape: ModelShape) -> list[Rule]:
    bias = [QKV_BIAS] if shape.attention_bias else []
    return [*ATTENTION, *bias, *(QK_NORM if shape.qk_norm else ())]


FAMILY = TrainedFamily(layer_rules=mixed(_attention, "shared_experts"))
