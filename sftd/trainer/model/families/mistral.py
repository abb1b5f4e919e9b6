"""Mistral: Llama's tensors under Llama's names."""

from sftd.trainer.model.families.llama import FAMILY

__all__ = ["FAMILY"]
