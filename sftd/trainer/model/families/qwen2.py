"""Qwen2: Llama with a bias on queries, keys and values."""

from __future__ import annotations

from sftd.trainer.model.families.llama import QKV_BIAS, dense
from sftd.trainer.model.families.seam import TrainedFamily

FAMILY = TrainedFamily(layer_rules=dense(QKV_BIAS))
