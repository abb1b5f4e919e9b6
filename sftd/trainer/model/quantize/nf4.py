"""NF4 (Dettmers et al. 2023, QLoRA): four bits a value, an FP32 scale for each block of 64 values of a row.

A block's values are divided by its largest magnitude and rounded to the nearest of 16 levels, the quantiles of a normal
distribution. Blocks lie along a row, so a rank that holds some rows, or a multiple of 64 columns, has the bits that the
whole matrix has there. A value half way between two levels becomes the lower one. CPU and GPU compute the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from sftd.domain.model.weights import NF4_BLOCK

# Appendix E of the paper.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Values that are quantised at a time: it bounds the working memory to about a GiB.
_VALUES = 1 << 26


class Quantized:
    """A matrix [out, in] in NF4: codes uint8 [out, in / 2], the even column in the low half of a byte; scales FP32
    [out, in / 64]. Unset until `fill`."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        rows, columns = shape
        assert columns % NF4_BLOCK == 0, f"{columns} columns are no multiple of {NF4_BLOCK}"
        self.codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        self.scales = torch.empty(rows, columns // NF4_BLOCK, dtype=torch.float32, device=device)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Quantise a weight [out, in] of any dtype and device. A block with a NaN or an infinity becomes NaN."""
        step = max(1, _VALUES // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            values = weight[rows].to(self.codes.device).float().unflatten(1, (-1, NF4_BLOCK))
            scales = values.abs().amax(-1)
            # A block of zeros has no largest magnitude to divide by.
            values = values / scales.where(scales != 0, 1.0)[..., None]
            codes = (
                torch.bucketize(values, _midpoints(values.device), out_int32=True).to(torch.uint8).flatten(1)
            )
            self.codes[rows] = codes[:, ::2] | codes[:, 1::2] << 4
            self.scales[rows] = scales

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """level · scale, computed in FP32 and rounded to `dtype`: [out, in]."""
        if self.codes.is_cuda:
            from sftd.trainer.model.kernels.nf4 import dequantize

            return dequantize(self.codes, self.scales, levels(self.codes.device), dtype)
        blocks = _pairs()[self.codes.int()].view(*self.scales.shape, NF4_BLOCK)
        return (blocks * self.scales[..., None]).to(dtype).flatten(1)


@cache
def levels(device: torch.device) -> Tensor:
    """The code book, FP32 [16]."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def _midpoints(device: torch.device) -> Tensor:
    """Half way between neighbouring levels, FP32 [15]."""
    return torch.tensor(
        [(low + high) / 2 for low, high in pairwise(LEVELS)], dtype=torch.float32, device=device
    )


@cache
def _pairs() -> Tensor:
    """The two values of each byte, FP32 [256, 2]."""
    table, byte = levels(torch.device("cpu")), torch.arange(256)
    return torch.stack((table[byte & 15], table[byte >> 4]), -1)
