"""Parameters of all experts, of one shape, as one tensor, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sftd.trainer.model.adapters.linears import main_grad
from sftd.trainer.model.gradients import accumulate_grouped_weight_gradient


def as_one_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape and contiguous, as a view [number, …] of their memory; None unless they lie in one buffer, in this
    order and at equal distances."""
    first = tensors[0]
    places = [tensor.data_ptr() for tensor in tensors]
    distance = places[1] - places[0] if len(places) > 1 else first.nbytes
    if distance < first.nbytes or distance % first.itemsize:
        return None
    buffer = first.untyped_storage().data_ptr()
    for number, tensor in enumerate(tensors):
        if places[number] != places[0] + number * distance or not tensor.is_contiguous():
            return None
        if tensor.untyped_storage().data_ptr() != buffer or tensor.shape != first.shape:
            return None
    stride = distance // first.itemsize
    return first.as_strided((len(tensors), *first.shape), (stride, *first.stride()), first.storage_offset())


def into_one_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors of one shape into one buffer [number, …], and return it."""
    buffer = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, buffer, strict=True):
        tensor.data = part
    return buffer


class ParameterGroup:
    """A parameter of each expert: all of their values, and their FP32 gradients.

    Megatron's data parallelism has placed trained parameters, and their gradients, at equal distances in one buffer; frozen ones
    are placed here. Where the distances differ, because padding of a bucket lies between two experts, the values are copied when
    they are used, and gradients are added one by one.
    """

    def __init__(self, parameters: Sequence[Any]) -> None:
        # Of a layer's experts all or none are trained.
        self.trained = [parameter for parameter in parameters if hasattr(parameter, "main_grad")]
        if not self.trained:
            into_one_buffer(parameters)
        self._each = [parameter.detach() for parameter in parameters]
        self._values = as_one_view(self._each)
        self._gradients = as_one_view([main_grad(each) for each in self.trained]) if self.trained else None

    def values(self) -> Tensor:
        """The values [experts, …]."""
        return torch.stack(self._each) if self._values is None else self._values

    def accumulate(self, inputs: Tensor, d_outputs: Tensor, ends: Tensor) -> None:
        """Add each expert's d_outputsᵀ · inputs, of its rows, to its gradient, where that is trained. A bias has inputs [n, 1]."""
        if not self.trained:
            return
        found = self._gradients
        if found is None:
            shape = len(self._each), *self._each[0].shape
            found = torch.zeros(shape, dtype=torch.float32, device=inputs.device)
        matrices = found if found.dim() == 3 else found.unsqueeze(-1)
        accumulate_grouped_weight_gradient(inputs, d_outputs, ends, matrices)
        if found is not self._gradients:
            for parameter, gradient in zip(self.trained, found, strict=True):
                main_grad(parameter).add_(gradient)
