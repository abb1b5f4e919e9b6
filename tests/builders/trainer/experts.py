"""Overrides that train a tiny mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders.trainer.trainers import MEGATRON

MODEL = "qwen3_moe"
EP2 = {MEGATRON + "expert_model_parallel_size": 2}


def overrides_of(models: Path, **overrides: Any) -> dict[str, Any]:
    sampled = {"trainer__sample_prompts": ["abc"], "trainer__sample_max_tokens": 8}
    routers = {
        "model__moe__load_balancing_loss": 0.5,
        "model__moe__z_loss": 0.01,
        "trainer__val_before_train": True,
        # So that there is padding.
        "training__micro_batch_size_per_gpu": 2,
    }
    return {"model__partial_pretrain": str(models / MODEL), **sampled, **routers, **overrides}
