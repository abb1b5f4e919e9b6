"""Split of Megatron's fused QKV with rotary embedding; backward merges the gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def qkv_rotary(
    qkv,
    part,
    angles,
    stride_s,
    stride_b,
    stride_h,
    tokens,
    batch,
    heads,
    per_group,
    first,
    group_width,
    half,
    sign,
    ROTATES: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Copy q, k or v of one token from its strided place in qkv to `part`, or back. `sign` −1 reverses the rotation."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_inside = (head < heads) & (column < half)
    groups = heads // per_group
    fused = (
        token * groups * group_width
        + (head // per_group) * group_width
        + first
        + (head % per_group) * 2 * half
        + column
    )
    apart = s * stride_s + b * stride_b + head * stride_h + column
    if SPLITS:
        low = tl.load(qkv + fused, mask=is_inside)
        high = tl.load(qkv + fused + half, mask=is_inside)
    else:
        low = tl.load(part + apart, mask=is_inside)
        high = tl.load(part + apart + half, mask=is_inside)
    if ROTATES:
        angle = s * half + column
        cos = tl.load(angles + angle, mask=column < half)
        sin = tl.load(angles + tokens * half + angle, mask=column < half) * sign
        x, y = low.to(tl.float32), high.to(tl.float32)
        low = (x * cos - y * sin).to(low.dtype)
        high = (y * cos + x * sin).to(high.dtype)
    if SPLITS:
        tl.store(part + apart, low, mask=is_inside)
        tl.store(part + apart + half, high, mask=is_inside)
    else:
        tl.store(qkv + fused, low, mask=is_inside)
        tl.store(qkv + fused + half, high, mask=is_inside)


def _launch(
    qkv: Tensor,
    part: Tensor,
    angles: Tensor,
    *,
    per_group: int,
    first: int,
    group_width: int,
    rotates: bool,
    splits: bool,
) -> None:
    tokens, batch, heads, width = part.shape
    assert part.stride(-1) == 1
    block = triton.next_power_of_2(heads) * triton.next_power_of_2(width // 2)
    qkv_rotary[(tokens * batch,)](
        qkv,
        part,
        angles,
        part.stride(0),
        part.stride(1),
        part.stride(2),
        tokens,
        batch,
        heads,
        per_group,
        first,
        group_width,
        width // 2,
        1.0 if splits else -1.0,
        ROTATES=rotates,
        SPLITS=splits,
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(width // 2),
        num_warps=min(max(block // 256, 1), 8),
    )


class SplitRotary(torch.autograd.Function):
    """(qkv [s, b, g · (n + 2) · d], angles [2, s, d / 2] FP32, groups g, d) → q, k, v, as `ops.split_rotary`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, angles: Tensor, groups: int, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launches one program per token for each of q, k and v."""
        qkv, angles = qkv.contiguous(), angles.contiguous()
        tokens, batch, width = qkv.shape
        group_width = width // groups
        per_group = group_width // head_dim - 2
        ctx.shape, ctx.places = qkv.shape, _places(per_group, head_dim, group_width)
        ctx.save_for_backward(angles)
        parts = tuple(qkv.new_empty(tokens, batch, groups * count, head_dim) for count in (per_group, 1, 1))
        for part, place in zip(parts, ctx.places, strict=True):
            _launch(qkv, part, angles, splits=True, **place)
        return parts[0], parts[1], parts[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of qkv: the parts' gradients, rotated back."""
        (angles,) = ctx.saved_tensors
        qkv = grads[0].new_empty(ctx.shape)
        for grad, place in zip(grads, ctx.places, strict=True):
            part = grad if grad.stride(-1) == 1 else grad.contiguous()
            _launch(qkv, part, angles, splits=False, **place)
        return qkv, None, None, None


def _places(per_group: int, head_dim: int, group_width: int) -> list[dict[str, Any]]:
    return [
        {"per_group": count, "first": first * head_dim, "group_width": group_width, "rotates": rotates}
        for count, first, rotates in ((per_group, 0, True), (1, per_group, True), (1, per_group + 1, False))
    ]
