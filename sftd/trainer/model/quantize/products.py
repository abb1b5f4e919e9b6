"""Megatron's products with a weight in four bits: it is dequantised in forward and again in backward, and not kept between.

The product's `weight` stays a parameter with the shape, dtype and marks that Megatron gave it, but on the meta device: it has
no memory, and nothing computes with it by mistake. Its `quantized` holds the values.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from sftd.trainer.model.quantize.nf4 import Quantized
from sftd.trainer.model.recompute import computed_again


class _Product:
    weight: Tensor

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        values = values_of(weight)
        with computed_again(values, lambda: values_of(weight)):
            return cast(Tensor, cast(Any, super())._forward_impl(input, values, *args, **kwargs))


class _Column(_Product, ColumnParallelLinear):
    pass


class _Row(_Product, RowParallelLinear):
    pass


def empty(layer: torch.nn.Module) -> None:
    """Put unset four-bit weights into the place of those of a layer's products, and free these."""
    for linear in layer.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            full = linear.weight
            weight: Any = torch.nn.Parameter(torch.empty_like(full, device="meta"), requires_grad=False)
            vars(weight).update(vars(full))
            weight.quantized = Quantized(full.shape, full.device)
            linear.weight = weight
            linear.__class__ = _Column if isinstance(linear, ColumnParallelLinear) else _Row


def quantized(weight: Tensor) -> Quantized | None:
    """What holds the values of a weight that is quantised."""
    return getattr(weight, "quantized", None)


def values_of(weight: Tensor) -> Tensor:
    """A product's weight, dequantised if it is quantised."""
    stored = quantized(weight)
    return weight if stored is None else stored.dequantize(weight.dtype)


def device_of(weight: Tensor) -> torch.device:
    """Where a product computes."""
    stored = quantized(weight)
    return weight.device if stored is None else stored.codes.device
