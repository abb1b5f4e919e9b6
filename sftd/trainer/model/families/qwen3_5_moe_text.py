"""Qwen3.5 with experts: its tensors, and those of experts."""

from sftd.trainer.model.families.qwen3_5_text import FAMILY

__all__ = ["FAMILY"]
