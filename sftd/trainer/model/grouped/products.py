"""One product of all of a rank's experts: their weights as one tensor [experts, out, in], and the gradients of these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from sftd.trainer.model.grouped.adapters import GroupedAdapters
from sftd.trainer.model.grouped.buffers import ParameterGroup, into_one_buffer
from sftd.trainer.model.quantize.nf4 import Quantized
from sftd.trainer.model.quantize.products import quantized


class GroupedProduct:
    """y = W x for each expert's rows, and its gradients. `linears`: Megatron's products of the experts, in the order of the rows.
    Their biases, if any, are added by the caller."""

    def __init__(self, linears: Sequence[Any]) -> None:
        weights = [linear.weight for linear in linears]
        stored = [quantized(weight) for weight in weights]
        self._dtype, self._count = weights[0].dtype, len(weights)
        self._quantized = None if stored[0] is None else _joined(stored)
        self._weights = None if stored[0] is not None else ParameterGroup(weights)
        self.bias: ParameterGroup | None = None
        if linears[0].bias is not None:
            self.bias = ParameterGroup([linear.bias for linear in linears])
        self.adapters: GroupedAdapters | None = None
        if hasattr(linears[0], "adapters"):
            self.adapters = GroupedAdapters([linear.adapters for linear in linears])

    @property
    def trained(self) -> list[Any]:
        """The parameters that are trained, without the adapters."""
        return [each for group in (self._weights, self.bias) if group is not None for each in group.trained]

    @property
    def keeps_input(self) -> bool:
        """Whether a gradient needs the product's input."""
        return self.adapters is not None or (self._weights is not None and bool(self._weights.trained))

    def values(self) -> Tensor:
        """The weights [experts, out, in]."""
        if self._weights is not None:
            return self._weights.values()
        assert self._quantized is not None
        return self._quantized.dequantize(self._dtype).unflatten(0, (self._count, -1))

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
        if self._weights is not None:
            self._weights.accumulate(x, dy, ends)


def multiply(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows [n, i] times its matrix [experts, i, o]: [n, o]. FP32 sums; deterministic: a program computes a tile."""
    if not rows.shape[0]:
        return rows.new_empty(0, matrices.shape[2])
    return F.grouped_mm(rows, matrices, offs=ends)


def _joined(stored: Sequence[Any]) -> Quantized:
    """Quantised matrices as one, one below the other. They share its memory."""
    whole = copy.copy(stored[0])
    whole.codes, whole.scales = (
        into_one_buffer([getattr(each, name) for each in stored]).flatten(0, 1)
        for name in ("codes", "scales")
    )
    return cast(Quantized, whole)
