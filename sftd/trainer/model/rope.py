"""Rotary position embedding (Su et al. 2021) by position id.

LongRoPE and dynamic NTK scaling depend on a sequence's length. Here it is that of the token's own sample, as if transformers
computed each sample alone, so that packing, padding and layouts change nothing; while an answer is generated, it is that of its
tokens so far.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.sequence_layout import SequenceLayout

_ORIGINAL = "original_max_position_embeddings"


def inverse_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """`theta^(-2i/d)` for i < d/2 and d = `rotary_dim`, with the model's RoPE scaling, FP32 [d / 2]; and what cosine and sine are
    multiplied by. If the scaling depends on the length, those of a short sequence."""
    frequency, scaling = _unscaled(shape.rope_theta, shape), shape.rope_scaling or {}
    match shape.rope_type:
        case "linear":
            return frequency / float(scaling["factor"]), 1.0
        case "llama3":
            return _llama3(frequency, scaling), 1.0
        case "yarn":
            return _yarn(frequency, scaling, shape)
        case "proportional":
            turned = int(float(scaling.get("partial_rotary_factor", 1.0)) * shape.head_dim // 2)
            # The last pairs are not rotated.
            frequency[turned:] = 0.0
            return frequency / float(scaling.get("factor", 1.0)), 1.0
        case "longrope":
            return _longrope(frequency, scaling, "short_factor"), _longrope_gain(scaling, shape)
    return frequency, 1.0


def _dynamic(shape: ModelShape, lengths: Tensor) -> Tensor:
    """Dynamic NTK scaling (transformers `modeling_rope_utils._compute_dynamic_ntk_parameters`) for sequences of lengths int64 [s, b]:
    FP32 [s, b, d / 2]."""
    factor, most = float((shape.rope_scaling or {})["factor"]), shape.max_position_embeddings
    d = shape.rotary_dim
    growth = factor * lengths.clamp(min=most).float() / most - (factor - 1)
    exponent = torch.arange(0, d, 2, device=lengths.device).float() / d
    return 1.0 / (shape.rope_theta * growth ** (d / (d - 2)))[..., None] ** exponent


def _unscaled(theta: float, shape: ModelShape) -> Tensor:
    exponent = torch.arange(0, shape.rotary_dim, 2, dtype=torch.int64).float() / shape.rotary_dim
    return 1.0 / (theta**exponent)


def _longrope(frequency: Tensor, scaling: dict[str, Any], factors: str) -> Tensor:
    """LongRoPE (Ding et al. 2024): each dimension is stretched by a factor of its own."""
    return frequency / torch.tensor(scaling[factors], dtype=torch.float32)


def _longrope_gain(scaling: dict[str, Any], shape: ModelShape) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    context = int(scaling[_ORIGINAL])
    factor = float(scaling.get("factor") or shape.max_position_embeddings / context)
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Stretches wavelengths longer than the original context by `factor`, keeps much shorter ones, and interpolates between the two
    (transformers `modeling_rope_utils._compute_llama3_parameters`)."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling[_ORIGINAL])
    wavelength = 2 * math.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / factor + smooth * frequency
    stretched = torch.where(wavelength > context / low, frequency / factor, frequency)
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_between, blended, stretched)


def _yarn(frequency: Tensor, scaling: dict[str, Any], shape: ModelShape) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): dimensions that turn less than `beta_slow` times in the original context are stretched by `factor`,
    those that turn more than `beta_fast` times are kept, with a ramp between them; attention is scaled by the square of the second result
    (transformers `modeling_rope_utils._compute_yarn_parameters`)."""
    context = float(scaling.get(_ORIGINAL) or shape.max_position_embeddings)
    factor = float(scaling.get("factor") or shape.max_position_embeddings / context)

    def turning(times: float) -> float:
        return shape.rotary_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    low, high = turning(float(scaling.get("beta_fast") or 32)), turning(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.rotary_dim - 1)
    places = torch.arange(frequency.numel(), dtype=torch.float32)
    stretched = ((places - low) / (high - low or 0.001)).clamp(0, 1)
    found = frequency / factor * stretched + frequency * (1 - stretched)
    if scaling.get("attention_factor") is not None:
        return found, float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return found, _gain(factor, scaling["mscale"]) / _gain(factor, scaling["mscale_all_dim"])
    return found, _gain(factor, 1.0)


def _gain(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_gain(shape: ModelShape) -> float:
    """What DeepSeek-V3 multiplies scores of attention by on top of YaRN's: the square of the gain of `mscale_all_dim`."""
    scaling = shape.rope_scaling or {}
    return _gain(float(scaling.get("factor") or 1), float(scaling.get("mscale_all_dim") or 0)) ** 2


class RotaryEmbedding(torch.nn.Module):
    """Replaces Megatron's, which has no position ids and loops over packed segments in every layer.

    GPTModel calls `get_rotary_seq_len` and passes the result to `forward`; here it is the micro-batch's layout.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        super().__init__()
        self._shape = shape
        # Not a buffer: a BF16 model casts its buffers, but the angles need FP32.
        frequencies, self._gain = inverse_frequencies(shape)
        self.frequencies = frequencies.to(device)
        # Those of long sequences.
        self._long = None
        if shape.rope_type == "longrope":
            plain = _unscaled(shape.rope_theta, shape)
            self._long = _longrope(plain, shape.rope_scaling or {}, "long_factor").to(device)
        self._local = None
        if shape.window_rope_theta is not None:
            self._local = _unscaled(shape.window_rope_theta, shape).to(device)

    def get_rotary_seq_len(self, *arguments: Any) -> SequenceLayout:
        """The `SequenceLayout`, which is GPTModel's last argument."""
        layout = arguments[-1]
        assert isinstance(layout, SequenceLayout)
        return layout

    def forward(self, layout: SequenceLayout, **_: object) -> Tensor:
        """Cosine and sine of each position's angles, scaled as YaRN does, once for all layers: FP32 [2, s, rotary_dim / 2], or
        [2, s, b, rotary_dim / 2] if rows differ in positions or in the lengths on which they depend; with `window_rope_theta` 4 instead of 2, the last two for
        layers with a window."""
        # With a last dimension for the frequencies.
        positions = layout.positions.float().unsqueeze(-1)
        if self._shape.rope_type in ("longrope", "dynamic"):
            angles = positions.view(positions.shape[0], -1, 1) * self._by_length(layout)
        else:
            angles = positions * self.frequencies
        found = torch.stack((angles.cos(), angles.sin()))
        if self._gain != 1.0:
            found = found * self._gain
        if self._local is None:
            return found
        local = positions * self._local
        local = (local if local.dim() == angles.dim() else local.unsqueeze(1)).expand_as(angles)
        return torch.cat((found, local.cos()[None], local.sin()[None]))

    def _by_length(self, layout: SequenceLayout) -> Tensor:
        """Frequencies for the length of each token's sequence: FP32 [s, b, rotary_dim / 2], or [1, 1, …] for one length."""
        lengths = layout.positions.max()[None, None] + 1 if layout.lengths is None else layout.lengths
        if self._long is None:
            return _dynamic(self._shape, lengths)
        is_long = lengths > int((self._shape.rope_scaling or {})[_ORIGINAL])
        return torch.where(is_long[..., None], self._long, self.frequencies)


def for_layer(angles: Tensor, shape: ModelShape, layer: int) -> Tensor:
    """Of `RotaryEmbedding`'s output what a layer uses: cosine and sine, FP32 [2, s, …]."""
    if shape.window_rope_theta is None:
        return angles
    return angles[2:] if shape.window(layer) is not None else angles[:2]


def grown(query: Tensor, positions: Tensor, shape: ModelShape) -> Tensor:
    """Queries [s, b, heads, d] · (1 + beta · log(1 + ⌊position / original context⌋)), as Ministral 3 has it from Llama 4; unchanged
    without a beta."""
    scaling = shape.rope_scaling or {}
    if not (beta := scaling.get("llama_4_scaling_beta")):
        return query
    scale = 1 + float(beta) * torch.log(1 + torch.floor(positions / int(scaling[_ORIGINAL])))
    return query * scale.view(scale.shape[0], -1, 1, 1).to(query.dtype)
