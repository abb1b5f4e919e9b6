"""Tokens to the order of their experts and back: see `grouped/dispatch.py`. A program reads and writes for one token, and no two
programs write the same place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def place_tokens(taken, ordinals, starts, slots, tokens, experts, TAKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of one token, in ascending order of its experts."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    is_inside = expert < experts
    is_taken = tl.load(taken + token * experts + expert, mask=is_inside, other=0) != 0
    ordinal = tl.load(ordinals + expert.to(tl.int64) * tokens + token, mask=is_taken, other=0)
    row = tl.load(starts + expert, mask=is_taken, other=0) + ordinal - 1
    number = tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
    tl.store(slots + token * TAKEN + number, row, mask=is_taken)


@triton.jit
def move_weights(
    taken, slots, dense, rows, experts, TO_ROWS: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's weights [experts] to its rows, or back: 0 for experts that it does not take."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    is_inside = expert < experts
    place = token * experts + expert
    is_taken = tl.load(taken + place, mask=is_inside, other=0) != 0
    number = tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
    row = tl.load(slots + token * TAKEN + number, mask=is_taken, other=0)
    if TO_ROWS:
        tl.store(rows + row, tl.load(dense + place, mask=is_taken, other=0.0), mask=is_taken)
    else:
        tl.store(dense + place, tl.load(rows + row, mask=is_taken, other=0.0), mask=is_inside)


@triton.jit
def spread_tokens(x, slots, out, width, TAKEN: tl.constexpr, BLOCK: tl.constexpr):
    """One block of a token's columns to each of its rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    value = tl.load(x + token * width + columns, mask=is_inside)
    for number in tl.static_range(TAKEN):
        row = tl.load(slots + token * TAKEN + number).to(tl.int64)
        tl.store(out + row * width + columns, value, mask=is_inside)


@triton.jit
def collect_tokens(rows, slots, out, width, TAKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The FP32 sum of one block of columns over a token's rows, in the order of `slots`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(TAKEN):
        row = tl.load(slots + token * TAKEN + number).to(tl.int64)
        total += tl.load(rows + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=is_inside)


def rows_of_tokens(taken: Tensor, ordinals: Tensor, starts: Tensor, count: int) -> Tensor:
    """taken bool [t, experts] with `count` in each row, ordinals int32 [experts, t], starts int32 [experts] → the rows of each
    token int32 [t, count]: starts + ordinals − 1 of its experts, ascending."""
    tokens, experts = taken.shape
    slots = torch.empty(tokens, count, dtype=torch.int32, device=taken.device)
    place_tokens[(tokens,)](
        taken.view(torch.uint8),
        ordinals,
        starts,
        slots,
        tokens,
        experts,
        TAKEN=count,
        BLOCK=triton.next_power_of_2(experts),
        num_warps=1,
    )
    return slots


def weights_to_rows(dense: Tensor, taken: Tensor, slots: Tensor) -> Tensor:
    """FP32 [t, experts] → [t · count], by row."""
    rows = torch.empty(slots.numel(), dtype=dense.dtype, device=dense.device)
    _move_weights(taken, slots, dense.contiguous(), rows, to_rows=True)
    return rows


def weights_from_rows(rows: Tensor, taken: Tensor, slots: Tensor) -> Tensor:
    """[t · count] → [t, experts], 0 where nothing is taken."""
    dense = torch.empty(taken.shape, dtype=rows.dtype, device=rows.device)
    _move_weights(taken, slots, dense, rows.contiguous(), to_rows=False)
    return dense


def _move_weights(taken: Tensor, slots: Tensor, dense: Tensor, rows: Tensor, *, to_rows: bool) -> None:
    tokens, experts = taken.shape
    move_weights[(tokens,)](
        taken.view(torch.uint8),
        slots,
        dense,
        rows,
        experts,
        TO_ROWS=to_rows,
        TAKEN=slots.shape[1],
        BLOCK=triton.next_power_of_2(experts),
        num_warps=1,
    )


def spread(x: Tensor, slots: Tensor) -> Tensor:
    """x [t, h], slots [t, count] → [t · count, h]: each token in each of its rows."""
    x = x.contiguous()
    tokens, width = x.shape
    out = x.new_empty(slots.numel(), width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    spread_tokens[(tokens, triton.cdiv(width, block))](
        x, slots, out, width, TAKEN=slots.shape[1], BLOCK=block, num_warps=4
    )
    return out


def collect(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [t · count, h], slots [t, count] → [t, h]: the sum over each token's rows."""
    rows = rows.contiguous()
    tokens, width = slots.shape[0], rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    collect_tokens[(tokens, triton.cdiv(width, block))](
        rows, slots, out, width, TAKEN=slots.shape[1], BLOCK=block, num_warps=4
    )
    return out
