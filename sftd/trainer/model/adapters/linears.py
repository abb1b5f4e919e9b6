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
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd import Function

from sftd.trainer.model.adapters.dropout import Dropout
from sftd.trainer.model.gradients import accumulate_weight_gradient
from sftd.trainer.model.quantize.products import device_of, values_of


class Adapter(torch.nn.Module):
    """A and B of one projection: a [r, in], b [out, r]; of one of the two this rank's share."""

    def __init__(self, a: tuple[int, int], b: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(a, dtype=like.dtype, device=device_of(like)))
        self.b = torch.nn.Parameter(torch.zeros(b, dtype=like.dtype, device=device_of(like)))


class Adapters(torch.nn.ModuleDict):
    """The adapters of one product, by projection.

    `rows`: of each projection its rows in the product's output, as (first row in a group, rows a group). `groups`: number of groups
    that the output consists of: query groups, else 1.

    The projections are computed as one. Their joined matrices are made once a step, and their joined gradients are added to
    Megatron's once a step: `begin_step` and `end_step`.
    """

    scale: float
    rows: dict[str, tuple[int, int]]
    groups: int
    dropout: Dropout | None
    _joined: tuple[Tensor, Tensor] | None = None
    _gradients: tuple[Tensor, Tensor] | None = None

    def begin_step(self) -> None:
        """Forget the joined matrices: an optimizer may have changed A and B."""
        self._joined = None

    def joined(self, height: int) -> tuple[Tensor, Tensor]:
        """A of all projections, one below the other, [r · projections, in], and scale · B of all as one matrix
        [height, r · projections] with zeros in the rows of other projections. `height`: rows of the product's output."""
        if self._joined is None:
            parts = self._each()
            a = torch.cat([part.a for part in parts])
            b = parts[0].b.new_zeros(height, a.shape[0])
            for part, place in zip(parts, self._places(b), strict=True):
                torch.mul(part.b.view(place.shape), self.scale, out=place)
            self._joined = a, b
        return self._joined

    def accumulate(self, x: Tensor, dz: Tensor, z: Tensor, dy: Tensor) -> None:
        """Add to the FP32 gradients of the joined matrices: dzᵀ · x to that of A, dyᵀ · z to that of B ÷ scale."""
        if self._gradients is None:
            a, b = (torch.zeros_like(m, dtype=torch.float32) for m in self.joined(dy.shape[1]))
            self._gradients = a, b
        accumulate_weight_gradient(x, dz, self._gradients[0])
        accumulate_weight_gradient(z, dy, self._gradients[1])

    def end_step(self) -> None:
        """Add the gradients to those of the parameters."""
        if self._gradients is None:
            return
        d_a, d_b = self._gradients
        for part, a, b in zip(self._each(), d_a.chunk(len(self)), self._places(d_b), strict=True):
            main_grad(part.a).add_(a)
            main_grad(part.b).view(b.shape).add_(b, alpha=self.scale)
        self._gradients = None

    def _each(self) -> list[Adapter]:
        return cast(list[Adapter], list(self.values()))

    def _places(self, joined: Tensor) -> Iterator[Tensor]:
        """Each projection's part of a matrix like the joined B: [groups, rows a group, r]."""
        grouped = joined.view(self.groups, -1, joined.shape[1])
        for name, columns in zip(self, grouped.chunk(len(self), -1), strict=True):
            start, count = self.rows[name]
            yield columns[:, start : start + count]


def main_grad(parameter: Any) -> Tensor:
    """Megatron's FP32 gradient of a parameter."""
    return cast(Tensor, parameter.main_grad)


class _Product(Function):
    """(x [s, b, in], module, the adapters' parameters) → y [s, b, out].

    Saves x (with sequence parallelism this rank's share) and z = A x. The weight gets no gradient; those of A and B are summed by
    `Adapters`. A quantised weight is dequantised in forward and again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: AdaptedColumn | AdaptedRow, *_parameters: Tensor) -> Tensor:
        adapters, flat, weight = module.adapters, x.flatten(0, -2), values_of(module.weight)
        ctx.keys = adapters.dropout.keys() if adapters.dropout and module.training else None
        a, b = adapters.joined(weight.shape[0])
        z = _gathered(_kept(flat, ctx.keys, adapters) @ a.t(), module)
        y = _sum(_gathered(flat, module), weight.t(), z, b.t(), None if module.skip_bias_add else module.bias)
        ctx.save_for_backward(x, z)
        ctx.module = module
        return y.view(-1, *x.shape[1:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z = ctx.saved_tensors
        module, adapters, flat = ctx.module, ctx.module.adapters, x.flatten(0, -2)
        dy, weight = grads[0].flatten(0, -2), values_of(module.weight)
        a, b = adapters.joined(dy.shape[1])
        dz = dy @ b
        dx: Tensor | None = None
        if not ctx.needs_input_grad[0]:
            dz = _scattered(dz, module)
        elif module.splits_input or ctx.keys is not None:
            dx, dz = _scattered(dy @ weight, module), _scattered(dz, module)
            share = dz @ a
            dx += share if ctx.keys is None else adapters.dropout.apply(share, ctx.keys)
        else:
            dx = _sum(dy, weight, dz, a)
        adapters.accumulate(_kept(flat, ctx.keys, adapters), dz, z, dy)
        if dx is not None:
            if module.sums_input_gradient:
                dist.all_reduce(dx, group=module.tp_group)
            dx = dx.view(x.shape)
        return dx, None, *[None] * (len(ctx.needs_input_grad) - 2)


def _sum(x: Tensor, w: Tensor, z: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w + z b + bias. The second product is thin: it goes first where the result is wide, because the first then adds it for less
    than a pass over the result."""
    if w.shape[1] > w.shape[0]:
        thin = z @ b if bias is None else torch.addmm(bias, z, b)
        return thin.addmm_(x, w)
    wide = x @ w if bias is None else torch.addmm(bias, x, w)
    return wide.addmm_(z, b)


def _kept(flat: Tensor, keys: Tensor | None, adapters: Adapters) -> Tensor:
    return flat if keys is None or adapters.dropout is None else adapters.dropout.apply(flat, keys)


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

    # Whether the ranks share the rows of the input (sequence parallelism), and whether backward sums its gradient over them.
    splits_input: bool
    sums_input_gradient: bool

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
    splits_input = sums_input_gradient = False

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


def adapt(linear: Any, adapters: Adapters) -> None:
    """Give one of Megatron's products adapters."""
    if isinstance(linear, ColumnParallelLinear):
        linear.__class__ = AdaptedColumn
        is_own = linear.explicit_expert_comm or linear.tp_group.size() == 1
        linear.splits_input = linear.sequence_parallel and not is_own
        linear.sums_input_gradient = not is_own and not linear.sequence_parallel
    else:
        linear.__class__ = AdaptedRow
    linear.adapters = adapters
    for adapter in adapters.values():
        _mark(cast(Adapter, adapter), linear)


def _mark(adapter: Adapter, linear: AdaptedColumn | AdaptedRow) -> None:
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


def adapters_of(
    modules: Iterable[torch.nn.Module], besides: Iterable[torch.nn.Module] = ()
) -> list[Adapters]:
    """The adapters of some modules and of all below them, but not those that are in `besides`."""
    known = {id(part) for module in besides for part in module.modules()}
    found = [part for module in modules for part in module.modules() if isinstance(part, Adapters)]
    return [part for part in found if id(part) not in known]


def sum_partial_gradients(adapters: Iterable[torch.nn.Module]) -> None:
    """Sum the gradients of which each tensor-parallel rank has a part: those of the A or B that every rank holds whole."""
    partial: list[Any] = [p for a in adapters for p in a.parameters() if hasattr(p, "partial_in")]
    for group in dict.fromkeys(p.partial_in for p in partial):
        gradients = [main_grad(p) for p in partial if p.partial_in is group]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(joined, group=group)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, joined.split(sizes), strict=True):
            gradient.copy_(total.view(gradient.shape))
