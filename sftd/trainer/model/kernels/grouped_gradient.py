"""Weight gradients of all experts, added to their FP32 gradients in one pass: half precision is read, and nothing is rounded to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of a gradient and rows at a time. In half precision two programs fit on a multiprocessor, so that one reads and writes
# its tile of the gradient while the other multiplies.
_HALF, _FULL = (128, 128, 64), (64, 64, 32)


@triton.jit
def add_weight_gradient(
    x,
    dy,
    ends,
    gradient,
    stride,
    height,
    width,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of one expert's gradient [height, width] += dyᵀ · x over the expert's rows, in ascending order."""
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(width, TILE_WIDTH)
    out = (tl.program_id(0) // tiles) * TILE_HEIGHT + tl.arange(0, TILE_HEIGHT)
    column = (tl.program_id(0) % tiles) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    first = tl.load(ends + tl.maximum(expert - 1, 0))
    first = tl.where(expert == 0, 0, first)
    last = tl.load(ends + expert)
    if first < last:
        row = tl.arange(0, ROWS)
        # Offsets of 32 bits from places of 64: they take fewer registers.
        left_offset, right_offset = (
            row[:, None] * height + out[None, :],
            row[:, None] * width + column[None, :],
        )
        is_left, is_right = (out < height)[None, :], (column < width)[None, :]
        total = tl.zeros((TILE_HEIGHT, TILE_WIDTH), tl.float32)
        for done in range(0, last - first, ROWS):
            is_row = (row < last - first - done)[:, None]
            place = (first + done).to(tl.int64)
            left = tl.load(dy + place * height + left_offset, mask=is_row & is_left, other=0.0)
            right = tl.load(x + place * width + right_offset, mask=is_row & is_right, other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        place = gradient + expert * stride + (out[:, None] * width + column[None, :])
        is_inside = (out < height)[:, None] & (column < width)[None, :]
        tl.store(place, tl.load(place, mask=is_inside) + total, mask=is_inside)


def accumulate(x: Tensor, dy: Tensor, ends: Tensor, gradient: Tensor) -> None:
    """x [n, i], dy [n, o], ends int32 [experts]: the row after each expert's last one; gradient FP32 [experts, o, i], whose
    matrices are contiguous."""
    x, dy = x.contiguous(), dy.contiguous()
    experts, height, width = gradient.shape
    assert gradient.stride()[1:] == (width, 1), "an expert's gradient has gaps"
    tiles = _FULL if x.dtype == torch.float32 else _HALF
    high, wide = (
        min(tile, max(16, triton.next_power_of_2(n))) for tile, n in zip(tiles, (height, width), strict=False)
    )
    add_weight_gradient[(triton.cdiv(height, high) * triton.cdiv(width, wide), experts)](
        x,
        dy,
        ends,
        gradient,
        gradient.stride(0),
        height,
        width,
        TILE_HEIGHT=high,
        TILE_WIDTH=wide,
        ROWS=tiles[2],
        num_warps=4,
        num_stages=3,
    )
