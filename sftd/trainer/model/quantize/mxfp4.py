"""MXFP4 (OCP Microscaling Formats 1.0), in which gpt-oss is published: blocks of 32 values of four bits with a common power of two."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
# The positive values of E2M1, by the bits after the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def stored(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of each tensor → the tensors that it is stored as: itself, or blocks and scales."""
    found: dict[str, tuple[str, ...]] = {}
    every = set(names)
    for name in every:
        base = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        both = base + _BLOCKS, base + _SCALES
        found |= {base: both} if every.issuperset(both) else {name: (name,)}
    return found


def values(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [experts, out, in / 32, 16], two values a byte, the lower bits first; scales uint8 [experts, out, in / 32],
    exponents of two plus 127 → BF16 [experts, in, out], which holds every value exactly."""
    levels = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
    both = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    exact = torch.ldexp(levels[both.int()], scales.int()[..., None] - _BIAS)
    return exact.flatten(-2).mT.to(torch.bfloat16)
