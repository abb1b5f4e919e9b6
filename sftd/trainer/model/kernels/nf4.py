"""NF4 to BF16 or FP32 (see `quantize/nf4.py`), at the speed of the memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Words of four bytes, eight values each, of one program: one load of 4 and one store of 16 bytes a thread in BF16.
_WORDS = 256


@triton.jit
def nf4_dequantize(codes, scales, levels, weight, count, WORDS: tl.constexpr):
    """`WORDS` words of codes. A scale belongs to eight words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    is_inside = word < count
    packed = tl.load(codes + word, mask=is_inside, other=0)
    scale = tl.load(scales + word // 8, mask=is_inside, other=0.0)
    value = tl.arange(0, 8)
    code = (packed[:, None] >> (value * 4)[None, :]) & 15
    result = tl.load(levels + code) * scale[:, None]
    place = word[:, None] * 8 + value[None, :]
    tl.store(weight + place, result.to(weight.dtype.element_ty), mask=is_inside[:, None])


def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [out, in / 2], scales FP32 [out, in / 64], levels FP32 [16] → [out, in]."""
    weight = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype, device=codes.device)
    words = codes.view(torch.int32)
    nf4_dequantize[(triton.cdiv(words.numel(), _WORDS),)](
        words, scales, levels, weight, words.numel(), WORDS=_WORDS, num_warps=_WORDS // 32
    )
    return weight
