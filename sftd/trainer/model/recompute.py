"""Recomputation of single tensors in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Recomputed:
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    shape: torch.Size


@contextmanager
def computed_again(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """Operations in the block do not save `tensor` for backward; backward recomputes it with `function(*inputs)`.

    The inputs stay in memory, so use inputs that stay there anyway. (Megatron's CheckpointWithoutOutput is similar, but
    needs TransformerEngine and a C++ compiler.)
    """
    place, size = tensor.data_ptr(), tensor.numel()
    detached = tuple(x.detach() for x in inputs)

    def pack(saved: Tensor) -> Any:
        if saved.data_ptr() == place and saved.numel() == size:
            return _Recomputed(function, detached, saved.shape)
        return saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _Recomputed):
            with torch.no_grad():
                return kept.function(*kept.inputs).view(kept.shape)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
