"""The operations between a layer's matrix products: in PyTorch, and on a GPU with the kernels in `kernels/`.

Both compute the same functions. The kernels sum in FP32 for any dtype.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension (Zhang & Sennrich 2019). x [..., h], weight [h], which may be
    FP32 for any dtype of x."""
    if x.is_cuda:
        from sftd.trainer.model.kernels.norm import RmsNorm

        return cast(Tensor, RmsNorm.apply(x, weight, eps))
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta (x itself without a delta) and its RMSNorm, both [..., h].

    On a GPU, one pass each in forward and backward: backward adds the residual's gradient to the norm's.
    """
    if x.is_cuda:
        from sftd.trainer.model.kernels.norm import AddRmsNorm

        return cast(tuple[Tensor, Tensor], AddRmsNorm.apply(x, delta, weight, eps))
    total = x if delta is None else x + delta
    return total, _rms_norm(total, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype != x.dtype:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) · up` (Shazeer 2020) of x [..., 2f], which holds the gate before the up projection: [..., f]."""
    if x.is_cuda:
        from sftd.trainer.model.kernels.swiglu import SwiGlu

        return cast(Tensor, SwiGlu.apply(x))
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """`gelu(gate) · up` (Shazeer 2020) with GELU's tanh approximation: x [..., 2f] → [..., f]."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu(x: Tensor) -> Tensor:
    """gpt-oss's `min(gate, 7) · sigmoid(1.702 · min(gate, 7)) · (clamp(up, −7, 7) + 1)`: x [..., 2f] → [..., f]."""
    gate, up = x.chunk(2, dim=-1)
    gate = gate.clamp(max=7.0)
    return gate * (1.702 * gate).sigmoid() * (up.clamp(-7.0, 7.0) + 1)


# By `hidden_act` of `ModelShape`.
GATED = {"silu": swiglu, "gelu_pytorch_tanh": geglu, "clamped_swiglu": clamped_swiglu}


def rotate(x: Tensor, angles: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the first r dimensions of x [s, b, heads, d]; angles FP32 [2, s, r / 2] or
    [2, s, b, r / 2], cos and sin. Dimension i is paired with i + r / 2, or with its neighbour if `is_interleaved`."""
    cos, sin = (angles if angles.dim() == 4 else angles[:, :, None]).unsqueeze(-2)
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    if is_interleaved:
        low, high = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2)
    else:
        low, high = rotated.float().chunk(2, dim=-1)
        pairs = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.cat((pairs.to(x.dtype), rest), dim=-1) if rest.shape[-1] else pairs.to(x.dtype)


def split_qkv(qkv: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's qkv [s, b, g · (n + 2) · d] (each group's n queries, its key, its value) → q [s, b, g · n, d], k and v
    [s, b, g, d]."""
    by_group = qkv.unflatten(-1, (groups, -1, head_dim))
    q, k, v = by_group.split((by_group.shape[3] - 2, 1, 1), dim=3)
    return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)


def split_rotary(qkv: Tensor, angles: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv` with the queries and keys rotated by `angles` (see `rotate`)."""
    if qkv.is_cuda:
        from sftd.trainer.model.kernels.rotary import SplitRotary

        return cast(tuple[Tensor, Tensor, Tensor], SplitRotary.apply(qkv, angles, groups, head_dim))
    q, k, v = split_qkv(qkv, groups, head_dim)
    return rotate(q, angles), rotate(k, angles), v
