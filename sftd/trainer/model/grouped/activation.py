"""What lies between the two products of an expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class RowBias(NamedTuple):
    """A bias of each expert [experts, width], contiguous, and the expert of each row int32 [n]."""

    values: Tensor
    experts: Tensor

    def rows(self) -> Tensor:
        """The bias of each row, FP32 [n, width]."""
        return self.values[self.experts.long()].float()

    def add_to(self, y: Tensor, weight: Tensor) -> None:
        """y [n, width] += weight FP32 [n] · the bias of each row."""
        if y.is_cuda:
            from sftd.trainer.model.kernels import expert_bias

            expert_bias.add_(y, weight, *self)
        else:
            y.copy_(y.float() + weight[:, None] * self.rows())

    def add_weight_gradient_to(self, d_weight: Tensor, dy: Tensor) -> None:
        """d_weight FP32 [n] += the gradient of `add_to`."""
        if dy.is_cuda:
            from sftd.trainer.model.kernels import expert_bias

            expert_bias.add_weight_gradient_(dy, d_weight, *self)
        else:
            d_weight.add_((dy.float() * self.rows()).sum(-1))


class Activation(NamedTuple):
    """forward: (x [n, 2f], weight FP32 [n], bias of x or None) → y [n, f]. backward: (dy [n, f], x, weight, bias) → y as in forward,
    dx, d_weight FP32.

    Row i of y is the activation of row i of x times weight[i], so that an expert's output needs no pass of its own to be
    weighted. y again costs backward one write, and forward need not keep it.
    """

    forward: Callable[[Tensor, Tensor, RowBias | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, RowBias | None], tuple[Tensor, Tensor, Tensor]]


def _forward(is_clamped: bool, x: Tensor, weight: Tensor, bias: RowBias | None) -> Tensor:
    if x.is_cuda:
        from sftd.trainer.model.kernels import weighted_swiglu

        return weighted_swiglu.forward(x, weight, *bias or (None, None), is_clamped=is_clamped)
    gate, up, slope = _parts(is_clamped, x, bias)
    return (gate * (slope * gate).sigmoid() * up * weight[:, None]).to(x.dtype)


def _backward(
    is_clamped: bool, dy: Tensor, x: Tensor, weight: Tensor, bias: RowBias | None
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        from sftd.trainer.model.kernels import weighted_swiglu

        return weighted_swiglu.backward(dy, x, weight, *bias or (None, None), is_clamped=is_clamped)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gate, up, slope = _parts(is_clamped, x, bias)
        y = gate * (slope * gate).sigmoid() * up
        weighted = y * weight[:, None]
        (dx,) = torch.autograd.grad(weighted, x, dy.float())
    return weighted.detach().to(x.dtype), dx, (dy.float() * y.detach()).sum(-1)


def _parts(is_clamped: bool, x: Tensor, bias: RowBias | None) -> tuple[Tensor, Tensor, float]:
    gate, up = (x.float() if bias is None else x.float() + bias.rows()).chunk(2, dim=-1)
    if is_clamped:
        return gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1, 1.702
    return gate, up, 1.0


# By `hidden_act` of `ModelShape`: the functions of `ops.GATED`.
ACTIVATIONS = {
    "silu": Activation(partial(_forward, False), partial(_backward, False)),
    "clamped_swiglu": Activation(partial(_forward, True), partial(_backward, True)),
}
