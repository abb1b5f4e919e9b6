"""Tensors of one shape as one tensor, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def together(tensors: Sequence[Tensor]) -> Tensor | None:
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


def place(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors of one shape into one buffer [number, …], and return it."""
    buffer = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, buffer, strict=True):
        tensor.data = part
    return buffer
