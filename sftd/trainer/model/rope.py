"""Rotary position embedding (Su et al. 2021) by position id."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.sequence_layout import SequenceLayout


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """`theta^(-2i/d)` for i < d/2, with the model's RoPE scaling: FP32 [head_dim / 2].

    Llama-3 scaling stretches wavelengths longer than the original context by `factor`, keeps much shorter ones, and
    interpolates between the two (transformers `modeling_rope_utils._compute_llama3_parameters`).
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequency = 1.0 / (shape.rope_theta**exponent)
    scaling = shape.rope_scaling
    if scaling is None or shape.rope_type == "default":
        return frequency
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / factor + smooth * frequency
    stretched = torch.where(wavelength > context / low, frequency / factor, frequency)
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_between, blended, stretched)


class RotaryEmbedding(torch.nn.Module):
    """Replaces Megatron's, which has no position ids and loops over packed segments in every layer.

    GPTModel calls `get_rotary_seq_len` and passes the result to `forward`; here it is the micro-batch's positions.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        super().__init__()
        # Not a buffer: a BF16 model casts its buffers, but the angles need FP32.
        self.frequencies = inverse_frequencies(shape).to(device)

    def get_rotary_seq_len(self, *arguments: Any) -> Tensor:
        """The positions int64 [s] of the `SequenceLayout`, which is GPTModel's last argument."""
        layout = arguments[-1]
        assert isinstance(layout, SequenceLayout)
        return layout.positions

    def forward(self, positions: Tensor, **_: object) -> Tensor:
        """Cosine and sine of each position's angles, once for all layers: FP32 [2, s, head_dim / 2]."""
        angles = torch.outer(positions.float(), self.frequencies)
        return torch.stack((angles.cos(), angles.sin()))
