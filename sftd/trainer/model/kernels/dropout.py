"""Dropout whose mask is a hash of the token, the product and the column: see `adapters.dropout`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def drop(x, keys, out, width, product, first, threshold, gain, BLOCK: tl.constexpr):
    """One block of a row: out = x · gain where the hash reaches the threshold, else 0."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    place = row * width + columns
    value = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    key = tl.load(keys + row).to(tl.uint32)
    bits = _mix(key ^ _mix(((columns + first) ^ product).to(tl.uint32)))
    kept = tl.where(bits.to(tl.int64) >= threshold, value * gain, 0.0)
    tl.store(out + place, kept.to(out.dtype.element_ty), mask=is_inside)


def dropped(x: Tensor, keys: Tensor, product: int, first_column: int, threshold: int, gain: float) -> Tensor:
    """x [n, in] with dropout; keys: int64 [n]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, width = x.shape
    grid = rows, triton.cdiv(width, _BLOCK)
    drop[grid](x, keys, out, width, product, first_column, threshold, gain, BLOCK=_BLOCK)
    return out
