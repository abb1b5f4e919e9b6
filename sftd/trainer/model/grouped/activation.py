"""What lies between the two products of an expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """forward: (x [n, 2f], weight FP32 [n]) → y [n, f]. backward: (dy [n, f], x, weight) → y as in forward, dx, d_weight FP32.

    Row i of y is the activation of row i of x times weight[i], so that an expert's output needs no pass of its own to be
    weighted. y again costs backward one write, and forward need not keep it.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    if x.is_cuda:
        from sftd.trainer.model.kernels import weighted_swiglu

        return weighted_swiglu.forward(x, weight)
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).to(x.dtype)


def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        from sftd.trainer.model.kernels import weighted_swiglu

        return weighted_swiglu.backward(dy, x, weight)
    gate, up = x.float().chunk(2, dim=-1)
    share, grad = gate.sigmoid(), dy.float()
    silu = gate * share
    scaled = grad * weight[:, None]
    dx = x.new_empty(x.shape)
    dx[:, : dy.shape[1]] = scaled * up * (share + silu * (1 - share))
    dx[:, dy.shape[1] :] = scaled * silu
    return _forward(x, weight), dx, (grad * silu * up).sum(-1)


# SwiGLU (Shazeer 2020) of gate and up projections that lie side by side.
SWIGLU = Activation(_forward, _backward)
