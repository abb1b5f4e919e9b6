"""The projections of a layer that adapters and quantisation apply to, and the sizes of their matrices."""

from __future__ import annotations

from sftd.domain.model.shape import ModelShape

# The projections of the feed-forward layer; in an MoE layer, of each expert.
FEED_FORWARD = ("gate", "up", "down")


def matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Projection → (outputs, inputs) of its matrix in the Hugging Face model; for a mixture of experts, in each expert."""
    h, heads, groups = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    units = shape.moe_intermediate_size if shape.num_experts else shape.intermediate_size
    return {
        "q": (heads * shape.head_dim, h),
        "k": (groups * shape.head_dim, h),
        "v": (groups * shape.head_dim, h),
        "o": (h, heads * shape.head_dim),
        "gate": (units, h),
        "up": (units, h),
        "down": (h, units),
    }
