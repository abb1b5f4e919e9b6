"""Qwen3: Llama with a norm of each head's queries and keys."""

from __future__ import annotations

from sftd.trainer.model.families.llama import QK_NORM, dense
from sftd.trainer.model.families.seam import TrainedFamily

FAMILY = TrainedFamily(layer_rules=dense(*QK_NORM))
