"""One product of all of a rank's experts: their weights as one tensor [experts, out, in], and the gradients of these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sftd.trainer.model.adapters.linears import main_grad
from sftd.trainer.model.gradients import accumulate_grouped_weight_gradient
from sftd.trainer.model.grouped.adapters import GroupedAdapters
from sftd.trainer.model.grouped.buffers import place, together
from sftd.trainer.model.quantize.nf4 import Quantized
from sftd.trainer.model.quantize.products import quantized


class GroupedProduct:
    """y = W x for each expert's rows, and its gradients. `linears`: Megatron's products of the experts, in the order of the rows.

    Megatron's data parallelism has placed trained weights, and their FP32 gradients, at equal distances in one buffer; frozen ones
    are placed here. Where the distances differ, because padding of a bucket lies between two experts, the weights are copied when
    they are used, and gradients are added one by one.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self._weights: list[Any] = [linear.weight for linear in linears]
        self._quantized: Quantized | None = None
        self._view: Tensor | None = None
        # Of a layer's experts all or none are trained.
        self.trained = [weight for weight in self._weights if hasattr(weight, "main_grad")]
        stored = [quantized(weight) for weight in self._weights]
        if stored[0] is not None:
            self._quantized = _joined(stored)
        else:
            if not self.trained:
                place(self._weights)
            self._view = together([weight.detach() for weight in self._weights])
        self._gradient = together([main_grad(weight) for weight in self.trained]) if self.trained else None
        self.adapters: GroupedAdapters | None = None
        if hasattr(linears[0], "adapters"):
            self.adapters = GroupedAdapters([linear.adapters for linear in linears])

    @property
    def keeps_input(self) -> bool:
        """Whether a gradient needs the product's input."""
        return bool(self.trained) or self.adapters is not None

    def values(self) -> Tensor:
        """The weights [experts, out, in]."""
        if self._quantized is not None:
            whole = self._quantized.dequantize(self._weights[0].dtype)
            return whole.unflatten(0, (len(self._weights), -1))
        return torch.stack(self._weights) if self._view is None else self._view

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [n, in] → (y [n, out], A x [n, r] with adapters)."""
        values = self.values()
        y = multiply(x, values.transpose(1, 2), ends)
        if self.adapters is None:
            return y, None
        a, b = self.adapters.joined(values.shape[1])
        z = multiply(x, a.transpose(1, 2), ends)
        return y.add_(multiply(z, b.transpose(1, 2), ends)), z

    def input_gradient(self, dy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """dy [n, out] → (dx [n, in], dy B [n, r] with adapters)."""
        dx = multiply(dy, self.values(), ends)
        if self.adapters is None:
            return dx, None
        a, b = self.adapters.joined(dy.shape[1])
        dz = multiply(dy, b, ends)
        return dx.add_(multiply(dz, a, ends)), dz

    def accumulate(self, x: Tensor, dy: Tensor, z: Tensor | None, dz: Tensor | None, ends: Tensor) -> None:
        """Add the gradients of the weights and adapters to their FP32 gradients."""
        if self.adapters is not None and z is not None and dz is not None:
            self.adapters.accumulate(x, dz, z, dy, ends)
        if self._gradient is not None:
            accumulate_grouped_weight_gradient(x, dy, ends, self._gradient)
        elif self.trained:
            shape = len(self._weights), *self._weights[0].shape
            found = torch.zeros(shape, dtype=torch.float32, device=x.device)
            accumulate_grouped_weight_gradient(x, dy, ends, found)
            for weight, gradient in zip(self.trained, found, strict=True):
                main_grad(weight).add_(gradient)


def multiply(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows [n, i] times its matrix [experts, i, o]: [n, o]. FP32 sums; deterministic: a program computes a tile."""
    if not rows.shape[0]:
        return rows.new_empty(0, matrices.shape[2])
    return F.grouped_mm(rows, matrices, offs=ends)


def _joined(stored: Sequence[Any]) -> Quantized:
    """Quantised matrices as one, one below the other. They share its memory."""
    whole = copy.copy(stored[0])
    whole.codes, whole.scales = (
        place([getattr(each, name) for each in stored]).flatten(0, 1) for name in ("codes", "scales")
    )
    return cast(Quantized, whole)
