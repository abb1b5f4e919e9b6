"""Overrides that train a tiny mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders.trainer.trainers import MEGATRON

MODEL = "qwen3_moe"
EP2 = {MEGATRON + "expert_model_parallel_size": 2}


def overrides_of(models: Path, **overrides: Any) -> dict[str, Any]:
    sampled = {"trainer__sample_prompts": ["abc"], "trainer__sample_max_tokens": 8}
    return {"model__partial_pretrain": str(models / MODEL), **sampled, **overrides}
