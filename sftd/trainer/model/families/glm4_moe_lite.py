"""GLM-4.7-Flash: DeepSeek-V3's tensors under its names."""

from sftd.trainer.model.families.deepseek_v3 import FAMILY

__all__ = ["FAMILY"]
