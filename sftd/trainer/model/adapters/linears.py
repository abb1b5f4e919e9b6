"""Megatron's products with adapters: `W x + scale · B A x` in one autograd function.

Tensor-parallel ranks share the adapters as they share W: the rows of B where W is cut along its rows, the columns of A where W is cut
along its columns. The other matrix is whole on every rank, and each rank has a part of its gradient: `sum_partial_gradients`
adds them up once a step. Only activations of the adapters' rank are communicated on top of what the product communicates anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd import Function

from sftd.trainer.model.adapters.dropout import Dropout
from sftd.trainer.model.gradients import accumulate_weight_gradient


class Adapter(torch.nn.Module):
    """A and B of one projection: a [r, in], b [out, r]; of one of the two this rank's share."""

    def __init__(self, a: tuple[int, int], b: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(a, dtype=like.dtype, device=like.device))
        self.b = torch.nn.Parameter(torch.zeros(b, dtype=like.dtype, device=like.device))


class Adapters(torch.nn.ModuleDict):
    """The adapters of one product, by projection.

    `rows`: of each projection its rows in the product's output, as (first row in a group, rows a group). `groups`: number of groups
    that the output consists of: query groups, else 1.
    """

    scale: float
    rows: dict[str, tuple[int, int]]
    groups: int
    dropout: Dropout | None

    def each(self) -> Iterator[Adapter]:
        """The adapters in the order of their projections in the output."""
        return cast(Iterator[Adapter], iter(self.values()))

    def joined_a(self) -> Tensor:
        """The A of all projections, one below the other: [r · projections, in]."""
        parts: list[Tensor] = [adapter.a for adapter in self.each()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def joined_b(self, width: int) -> Tensor:
        """The B of all projections as one matrix [width, r · projections], with zeros in the rows of other projections."""
        parts = [adapter.b for adapter in self.each()]
        if self._is_single(width):
            return parts[0]
        joined = parts[0].new_zeros(width, parts[0].shape[1] * len(parts))
        for part, place in zip(parts, self._places(joined), strict=True):
            place.copy_(part.view(place.shape))
        return joined

    def accumulate_a(self, x: Tensor, dz: Tensor) -> None:
        """Add the gradient of `joined_a`, dzᵀ · x, to Megatron's FP32 gradients."""
        if len(self) == 1:
            accumulate_weight_gradient(x, dz, self._gradient("a"))
            return
        gradient = _fp32_product(dz, x)
        for adapter, part in zip(self.each(), gradient.chunk(len(self)), strict=True):
            main_grad(adapter.a).add_(part)

    def accumulate_b(self, z: Tensor, dy: Tensor) -> None:
        """Add the gradient of `joined_b`, dyᵀ · z, to Megatron's FP32 gradients."""
        if self._is_single(dy.shape[1]):
            accumulate_weight_gradient(z, dy, self._gradient("b"))
            return
        gradient = _fp32_product(dy, z)
        for adapter, place in zip(self.each(), self._places(gradient), strict=True):
            main_grad(adapter.b).view(place.shape).add_(place)

    def _is_single(self, width: int) -> bool:
        return len(self) == 1 and next(self.each()).b.shape[0] == width

    def _gradient(self, name: str) -> Tensor:
        return main_grad(getattr(next(self.each()), name))

    def _places(self, joined: Tensor) -> Iterator[Tensor]:
        """Each projection's part of a matrix like `joined_b`: [groups, rows a group, r]."""
        grouped = joined.view(self.groups, -1, joined.shape[1])
        for name, columns in zip(self, grouped.chunk(len(self), -1), strict=True):
            start, count = self.rows[name]
            yield columns[:, start : start + count]


def main_grad(parameter: Any) -> Tensor:
    """Megatron's FP32 gradient of a parameter."""
    return cast(Tensor, parameter.main_grad)


class _Product(Function):
    """(x [s, b, in], module, the adapters' parameters) → y [s, b, out].

    Saves x (with sequence parallelism this rank's share) and z = scale · A x. The weight gets no gradient; those of A and B are
    added to Megatron's `main_grad`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: AdaptedColumn | AdaptedRow, *_parameters: Tensor) -> Tensor:
        adapters, flat = module.adapters, x.flatten(0, -2)
        y = F.linear(_gathered(flat, module), module.weight, None if module.skip_bias_add else module.bias)
        ctx.keys = adapters.dropout.keys() if adapters.dropout and module.training else None
        z = _scaled(_kept(flat, ctx.keys, adapters), adapters.joined_a().t(), adapters.scale)
        z = _gathered(z, module)
        y.addmm_(z, adapters.joined_b(y.shape[1]).t())
        ctx.save_for_backward(x, z)
        ctx.module = module
        return y.view(-1, *x.shape[1:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z = ctx.saved_tensors
        module, adapters, flat = ctx.module, ctx.module.adapters, x.flatten(0, -2)
        dy = grads[0].flatten(0, -2)
        adapters.accumulate_b(z, dy)
        dz = _scattered(_scaled(dy, adapters.joined_b(dy.shape[1]), adapters.scale), module)
        adapters.accumulate_a(_kept(flat, ctx.keys, adapters), dz)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _scattered(dy @ module.weight, module)
            if ctx.keys is None:
                dx.addmm_(dz, adapters.joined_a())
            else:
                dx += adapters.dropout.apply(dz @ adapters.joined_a(), ctx.keys)
            if module.sums_input_gradient:
                dist.all_reduce(dx, group=module.tp_group)
            dx = dx.view(x.shape)
        return dx, None, *[None] * (len(ctx.needs_input_grad) - 2)


def _kept(flat: Tensor, keys: Tensor | None, adapters: Adapters) -> Tensor:
    return flat if keys is None or adapters.dropout is None else adapters.dropout.apply(flat, keys)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, rounded once."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b in FP32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return (a.t() @ b).float()


def _gathered(x: Tensor, module: AdaptedColumn | AdaptedRow) -> Tensor:
    """Rows of all ranks, where the module's input is split over them."""
    if not module.splits_input:
        return x
    whole = x.new_empty(x.shape[0] * module.tp_group.size(), x.shape[1])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=module.tp_group)
    return whole


def _scattered(x: Tensor, module: AdaptedColumn | AdaptedRow) -> Tensor:
    """This rank's rows of the sum over the ranks, where the module's input is split over them."""
    if not module.splits_input:
        return x
    share = x.new_empty(x.shape[0] // module.tp_group.size(), x.shape[1])
    dist.reduce_scatter_tensor(share, x.contiguous(), group=module.tp_group)
    return share


class AdaptedColumn(ColumnParallelLinear):
    """A product cut along its rows, with adapters. Its input is whole, or with sequence parallelism split."""

    adapters: Adapters

    @property
    def splits_input(self) -> bool:
        """Whether the ranks share the rows of the input (sequence parallelism)."""
        return bool(self.sequence_parallel and not self.explicit_expert_comm)

    @property
    def sums_input_gradient(self) -> bool:
        """Whether backward sums the input's gradient over the ranks here."""
        return self.tp_group.size() > 1 and not self.sequence_parallel and not self.explicit_expert_comm

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, plus the adapters' share."""
        output = _Product.apply(input_, self, *self.adapters.parameters())
        return output, self.bias if self.skip_bias_add else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapters' places in a checkpoint. The product is not in it."""
        return _places(self, "b", 0, prefix, sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):
    """A product cut along its columns, with an adapter. Its output, a part of a sum over the ranks, is reduced here."""

    adapters: Adapters
    splits_input = False
    sums_input_gradient = False

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, plus the adapter's share."""
        output = _Product.apply(input_, self, *self.adapters.parameters())
        if not self.explicit_expert_comm and self.tp_group.size() > 1:
            if self.sequence_parallel:
                output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
            else:
                output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output, self.bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapter's place in a checkpoint. The product is not in it."""
        return _places(self, "a", 1, prefix, sharded_offsets, metadata)


def _places(
    linear: AdaptedColumn | AdaptedRow, cut: str, axis: int, prefix: str, offsets: Any, metadata: Any
) -> dict[str, Any]:
    state = linear.adapters.state_dict(prefix="adapters.", keep_vars=True)
    axes = {name: axis for name in state if name.endswith(f".{cut}")}
    return cast(
        dict[str, Any],
        make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=linear.tp_group, dp_cp_group=metadata["dp_cp_group"]
        ),
    )


def mark(adapter: Adapter, linear: AdaptedColumn | AdaptedRow) -> None:
    """Mark A and B for Megatron as the product's weight is: where they are reduced, and which rank's copy counts."""
    is_cut_by_rows = isinstance(linear, AdaptedColumn)
    split, whole = (adapter.b, adapter.a) if is_cut_by_rows else (adapter.a, adapter.b)
    parameters: list[Any] = [split, whole]
    for parameter in parameters:
        parameter.allreduce = linear.weight.allreduce
    # Without ranks that share an expert, each rank's experts are its own, whatever its tensor-parallel rank.
    for parameter in parameters if linear.tp_group.size() == 1 else parameters[:1]:
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = (0 if is_cut_by_rows else 1), 1
    if linear.tp_group.size() > 1:
        parameters[1].partial_in = linear.tp_group


def sum_partial_gradients(parameters: Iterable[Any]) -> None:
    """Sum the gradients of which each tensor-parallel rank has a part: those of the A or B that every rank holds whole."""
    partial = [p for p in parameters if hasattr(p, "partial_in")]
    for group in dict.fromkeys(p.partial_in for p in partial):
        gradients = [main_grad(p) for p in partial if p.partial_in is group]
        joined = _flatten_dense_tensors(gradients)
        dist.all_reduce(joined, group=group)
        torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(joined, gradients)))
