"""Qwen3-MoE: Qwen3 with experts instead of its MLP in all layers, or in most."""

from __future__ import annotations

from sftd.trainer.model.families.llama import ATTENTION, QK_NORM, mixed
from sftd.trainer.model.families.seam import TrainedFamily

FAMILY = TrainedFamily(layer_rules=mixed(lambda shape: (*ATTENTION, *QK_NORM)))
