"""Tensors that backward computes again instead of finding them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Again:
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    shape: torch.Size


@contextmanager
def computed_again(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """Where an operation inside the block would keep `tensor` for its backward, that calls `function(*inputs)`, which is
    what made it, instead.

    The inputs are kept; they should be kept by something else anyway. (Megatron's CheckpointWithoutOutput does the like,
    but needs TransformerEngine and a C++ compiler.)
    """
    place, size = tensor.data_ptr(), tensor.numel()
    again = tuple(x.detach() for x in inputs)

    def pack(saved: Tensor) -> Any:
        if saved.data_ptr() == place and saved.numel() == size:
            return _Again(function, again, saved.shape)
        return saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _Again):
            with torch.no_grad():
                return kept.function(*kept.inputs).view(kept.shape)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
