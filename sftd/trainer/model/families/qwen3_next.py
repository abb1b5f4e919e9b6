"""Qwen3-Next: Qwen3.5 with experts, and the projections of its delta nets as two tensors."""

from sftd.trainer.model.families.qwen3_5_text import FAMILY

__all__ = ["FAMILY"]
