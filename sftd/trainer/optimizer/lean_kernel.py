"""The update of `lean_update` as one Triton kernel, bit for bit. Import it only on a machine with a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftd.trainer.optimizer.lean_update import Coefficients, Rectangle

_MOST = 1024


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _load(place, mask):
    bits = tl.load(place, mask=mask, other=0).to(tl.uint16, bitcast=True)
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _store(place, x, random, mask):
    bits = x.to(tl.uint32, bitcast=True)
    bits += tl.where((bits & 0x7F800000) == 0x7F800000, 0, random).to(tl.uint32)
    tl.store(place, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=["first_row", "first_column", "key1", "key2", "key3"])
def lean_adamw(
    weight,
    first,
    second,
    gradient,
    factor,
    columns,
    first_row,
    first_column,
    key1,
    key2,
    key3,
    keep,
    beta1,
    rest1,
    beta2,
    rest2,
    unbias,
    eps,
    rate,
    BLOCK: tl.constexpr,
):
    """A part of one row. Weight and moments are BF16 bits as int16."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    place = row.to(tl.int64) * columns + column
    far = (first_row + row).to(tl.uint32) * 0x9E3779B9
    random = (first_column + column).to(tl.uint32) * 0x9E3779B9
    random = _mix(random + _mix(far + key1.to(tl.uint32)))
    random = _mix(random ^ _mix(far + key2.to(tl.uint32)))
    more = _mix(random ^ _mix(far + key3.to(tl.uint32)))
    g = tl.load(gradient + place, mask=mask, other=0.0) * tl.load(factor)
    m = _load(first + place, mask) * beta1 + g * rest1
    v = _load(second + place, mask) * beta2 + g * g * rest2
    step = tl.div_rn(m, tl.sqrt_rn(v) * unbias + eps)
    w = _load(weight + place, mask) * keep - step * rate
    _store(weight + place, w, random & 0xFFFF, mask)
    _store(first + place, m, random >> 16, mask)
    _store(second + place, v, more & 0xFFFF, mask)


def update(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    factor: Tensor,
    place: Rectangle,
    three: tuple[int, int, int],
    s: Coefficients,
) -> None:
    """Update, in place, BF16 weight and moments [rows · columns] from an FP32 gradient times the FP32 scalar `factor`."""
    block = min(_MOST, triton.next_power_of_2(place.columns))
    lean_adamw[(place.rows, triton.cdiv(place.columns, block))](
        *(x.view(torch.int16) for x in (weight, first, second)),
        gradient,
        factor,
        place.columns,
        # Signed, so that each has the same type in every update.
        *(_signed(x) for x in (place.row, place.column, *three)),
        *s,
        BLOCK=block,
        num_warps=max(1, min(4, block // 256)),
        # A product and a sum are rounded one by one.
        enable_fp_fusion=False,
    )


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
