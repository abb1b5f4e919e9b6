"""SmolLM3: Llama's tensors; some layers have no rotary embedding (`ModelShape.layers_without_rope`)."""

from sftd.trainer.model.families.llama import FAMILY

__all__ = ["FAMILY"]
