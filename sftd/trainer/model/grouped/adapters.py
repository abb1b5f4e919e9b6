"""Adapters of one product of all of a rank's experts (see `adapters/linears.py` for those of one product)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from sftd.trainer.model.adapters.linears import Adapter, Adapters, main_grad
from sftd.trainer.model.gradients import accumulate_grouped_weight_gradient
from sftd.trainer.model.grouped.buffers import as_one_view

# Rows of a grouped product lie at multiples of 16 bytes.
_ALIGNED = 8


class GroupedAdapters(torch.nn.Module):
    """The adapters of each expert, in the order of the rows, with joined matrices and gradients as `Adapters` has them: made
    once a step, and added to Megatron's gradients once a step. Rules refuse dropout here: the tokens' keys are not known."""

    def __init__(self, experts: Sequence[Adapters]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)
        first = experts[0]
        self._names = list(first)
        self._scale, self._places = first.scale, first.rows
        self._rank = cast(Adapter, first[self._names[0]]).a.shape[0]
        self._joined: tuple[Tensor, Tensor] | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None

    def begin_step(self) -> None:
        """Forget the joined matrices: an optimizer may have changed A and B."""
        self._joined = None

    def joined(self, height: int) -> tuple[Tensor, Tensor]:
        """A of all projections [experts, r, in] and scale · B [experts, height, r], as `Adapters.joined`; r is the rank times the
        number of projections, and rounded up with zeros to a multiple of 8."""
        if self._joined is None:
            like = self._parameters_of(self._names[0], "a")[0]
            rank = -(-len(self._names) * self._rank // _ALIGNED) * _ALIGNED
            a = like.new_zeros(len(self.experts), rank, like.shape[1])
            b = like.new_zeros(len(self.experts), height, rank)
            for name, of_a, of_b in self._parts(a, b):
                of_a.copy_(_stacked(self._parameters_of(name, "a")))
                torch.mul(_stacked(self._parameters_of(name, "b")), self._scale, out=of_b)
            self._joined = a, b
        return self._joined

    def accumulate(self, x: Tensor, dz: Tensor, z: Tensor, dy: Tensor, ends: Tensor) -> None:
        """Add to the FP32 gradients of the joined matrices: each expert's dzᵀ · x to that of A, dyᵀ · z to that of B ÷ scale."""
        if self._gradients is None:
            a, b = (torch.zeros_like(m, dtype=torch.float32) for m in self.joined(dy.shape[1]))
            self._gradients = a, b
        accumulate_grouped_weight_gradient(x, dz, ends, self._gradients[0])
        accumulate_grouped_weight_gradient(z, dy, ends, self._gradients[1])

    def end_step(self) -> None:
        """Add the gradients to those of the parameters."""
        if self._gradients is None:
            return
        for name, of_a, of_b in self._parts(*self._gradients):
            _add([main_grad(p) for p in self._parameters_of(name, "a")], of_a, 1.0)
            _add([main_grad(p) for p in self._parameters_of(name, "b")], of_b, self._scale)
        self._gradients = None

    def _parameters_of(self, name: str, matrix: str) -> list[Tensor]:
        return [getattr(cast(Adapters, expert)[name], matrix) for expert in self.experts]

    def _parts(self, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each projection's part of matrices like the joined A and B."""
        for number, name in enumerate(self._names):
            columns = slice(number * self._rank, (number + 1) * self._rank)
            start, count = self._places[name]
            yield name, a[:, columns], b[:, start : start + count, columns]


def _stacked(tensors: list[Tensor]) -> Tensor:
    tensors = [tensor.detach() for tensor in tensors]
    view = as_one_view(tensors)
    return torch.stack(tensors) if view is None else view


def _add(gradients: list[Tensor], found: Tensor, factor: float) -> None:
    view = as_one_view(gradients)
    if view is not None:
        view.add_(found, alpha=factor)
    else:
        for gradient, part in zip(gradients, found, strict=True):
            gradient.add_(part, alpha=factor)
