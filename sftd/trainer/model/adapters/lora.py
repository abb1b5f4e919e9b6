"""Low-rank adapters (LoRA, Hu et al. 2021): `W x + scale · B A x` with a frozen W, and trained A [r, in] and B [out, r].

Each projection of the Hugging Face model has an A and a B of its own, also where Megatron computes several projections in one
product (q, k, v; gate, up), so that they map one to one to PEFT's tensors. Tensor-parallel ranks share what they share of W:
the rows of B where W is cut along its rows (q, k, v, gate, up), the columns of A where it is cut along its columns (o, down).
The other matrix is whole on every rank, and only activations of width r are communicated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import ALL_LINEAR, Lora, Model
from sftd.trainer.model import weights
from sftd.trainer.model.families.rules import Rule
from sftd.trainer.model.weights import Folder
from sftd.trainer.runtime.session import Layout

# PEFT's file of weights, and what it puts before the model's own names.
ADAPTER_FILES = ("adapter_model.safetensors",)
PREFIX = "base_model.model."

# Megatron's products of a layer, and the projections in each, in the order of the `sources` of its rule.
FUSED = {
    "linear_qkv": ("q", "k", "v"),
    "linear_proj": ("o",),
    "linear_fc1": ("gate", "up"),
    "linear_fc2": ("down",),
}


def is_adapter(name: str) -> bool:
    """Whether a parameter of the model, by its name, belongs to an adapter."""
    return ".adapters." in name


class _Adapter(torch.nn.Module):
    """A and B of one projection: a [r, in], b [out, r]; of one of the two this rank's share."""

    def __init__(self, a: tuple[int, int], b: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(a, dtype=like.dtype, device=like.device))
        self.b = torch.nn.Parameter(torch.zeros(b, dtype=like.dtype, device=like.device))


class _Adapters(torch.nn.ModuleDict):
    """The adapters of one of Megatron's products, by projection."""

    scale: float

    def shrink(self, x: Tensor) -> Tensor:
        """x [s, b, in] → scale · A x of every projection, one after the other [s, b, r · projections]."""
        return F.linear(x, torch.cat([adapter.a for adapter in self._each()])) * self.scale

    def expand(self, z: Tensor) -> dict[str, Tensor]:
        """[s, b, r · projections] → what each projection adds to its output."""
        parts = z.chunk(len(self), -1)
        outputs = (F.linear(part, adapter.b) for part, adapter in zip(parts, self._each(), strict=True))
        return dict(zip(self, outputs, strict=True))

    def _each(self) -> Iterator[_Adapter]:
        return cast(Iterator[_Adapter], iter(self.values()))


class _Column(ColumnParallelLinear):
    """A product cut along its rows, with adapters."""

    adapters: _Adapters

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; the adapters' share is added."""
        output, bias = super().forward(input_, *args, **kwargs)
        z = self.adapters.shrink(input_)
        if not self.explicit_expert_comm and self.tp_group.size() > 1:
            if self.sequence_parallel:
                z = gather_from_sequence_parallel_region(z, group=self.tp_group)
            else:
                z = copy_to_tensor_model_parallel_region(z, group=self.tp_group)
        return output + self._joined(self.adapters.expand(z), output), bias

    def _joined(self, parts: dict[str, Tensor], output: Tensor) -> Tensor:
        names, sizes = self.projections
        if len(parts) < len(names):
            parts = {
                name: parts[name] if name in parts else output.new_zeros(*output.shape[:-1], size)
                for name, size in zip(names, sizes, strict=True)
            }
        if self.groups:
            return torch.cat([p.unflatten(-1, (self.groups, -1)) for p in parts.values()], -1).flatten(-2)
        return torch.cat(list(parts.values()), -1)

    # Names of the product's projections, and this rank's width of each.
    projections: tuple[tuple[str, ...], tuple[int, ...]]
    # Query groups that the projections are interleaved by; 0 where they follow each other.
    groups: int

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapters' places in a checkpoint. The base is not in it."""
        return _places(self, "b", 0, prefix, sharded_offsets, metadata)


class _Row(RowParallelLinear):
    """A product cut along its columns, with an adapter."""

    adapters: _Adapters

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; the adapter's share is added."""
        output, bias = super().forward(input_)
        z = self.adapters.shrink(input_)
        if not self.explicit_expert_comm and self.tp_group.size() > 1:
            if self.sequence_parallel:
                z = reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
            else:
                z = reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        (part,) = self.adapters.expand(z).values()
        return output + part, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapter's place in a checkpoint. The base is not in it."""
        return _places(self, "a", 1, prefix, sharded_offsets, metadata)


def _places(
    linear: _Column | _Row, cut: str, axis: int, prefix: str, offsets: Any, metadata: Any
) -> dict[str, Any]:
    state = linear.adapters.state_dict(prefix="adapters.", keep_vars=True)
    axes = {name: axis for name in state if name.endswith(f".{cut}")}
    return cast(
        dict[str, Any],
        make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=linear.tp_group, dp_cp_group=metadata["dp_cp_group"]
        ),
    )


def _attach(model: GPTModel, lora: Lora, shape: ModelShape) -> None:
    """Freeze the model and put adapters, with unset A and B = 0, beside the products that `lora` names."""
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        projections = FUSED.get(name.rpartition(".")[2], ())
        chosen = [p for p in projections if p in targets(lora)]
        if not chosen:
            continue
        rows, columns = linear.weight.shape
        adapters = _Adapters()
        if isinstance(linear, ColumnParallelLinear):
            sizes = _widths(rows, projections, shape)
            linear.__class__, linear.projections = _Column, (projections, sizes)
            linear.groups = sizes[1] // shape.head_dim if projections[0] == "q" else 0
            widths = dict(zip(projections, sizes, strict=True))
        else:
            linear.__class__, widths = _Row, {projections[0]: rows}
        for projection in chosen:
            adapter: Any = _Adapter((lora.rank, columns), (widths[projection], lora.rank), linear.weight)
            is_cut = isinstance(linear, _Column)
            split, whole = (adapter.b, adapter.a) if is_cut else (adapter.a, adapter.b)
            for parameter in (split, whole):
                parameter.allreduce = linear.weight.allreduce
            if linear.tp_group.size() > 1:
                split.tensor_model_parallel = True
                split.partition_dim, split.partition_stride = (0 if is_cut else 1), 1
                # Each rank has the gradient of its share of the sequence, or of an expert's tokens.
                whole.sequence_parallel = linear.sequence_parallel or linear.explicit_expert_comm
            adapters[projection] = adapter
        adapters.scale = scale(lora)
        linear.adapters = adapters


def _widths(rows: int, projections: tuple[str, ...], shape: ModelShape) -> tuple[int, ...]:
    """Width of each projection in a product of `rows` rows."""
    if projections[0] != "q":
        return (rows // len(projections),) * len(projections)
    groups = (
        shape.num_key_value_heads
        * rows
        // ((shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim)
    )
    queries = groups * shape.num_attention_heads // shape.num_key_value_heads
    return queries * shape.head_dim, groups * shape.head_dim, groups * shape.head_dim


def targets(lora: Lora) -> tuple[str, ...]:
    """The projections that get an adapter."""
    everything = tuple(name for names in FUSED.values() for name in names)
    return everything if ALL_LINEAR in lora.targets else tuple(lora.targets)


def scale(lora: Lora) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / √r (rank-stabilised, Kalajdzievski 2023)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def rules(weight_rules: Iterable[Rule], lora: Lora) -> Iterator[Rule]:
    """The adapters' parameters, from the rules of the weights: their names in Megatron and in PEFT."""
    for rule in weight_rules:
        product = rule.target.removesuffix(".weight").rpartition(".")[2]
        for projection, source in zip(FUSED.get(product, ()), rule.sources, strict=False):
            if not rule.target.endswith(".weight") or projection not in targets(lora):
                continue
            target = rule.target.removesuffix("weight") + f"adapters.{projection}"
            name = source.removesuffix("weight")
            a: Literal["whole", "columns"] = "columns" if rule.cut == "columns" else "whole"
            b: Literal["whole", "rows"] = "rows" if rule.cut == "rows" else "whole"
            yield Rule(f"{target}.a", (f"{name}lora_A.weight",), a)
            yield Rule(f"{target}.b", (f"{name}lora_B.weight",), b)


@torch.no_grad()
def add(chunks: list[GPTModel], model: Model, shape: ModelShape, layout: Layout, *, is_new: bool) -> None:
    """Freeze loaded chunks and put adapters beside their products. `is_new`: fill them as `model.lora` says; otherwise a
    checkpoint will. Raises `UserError`."""
    lora = model.lora
    with ExitStack() as stack:
        folder = Folder(lora.adapter, stack, ADAPTER_FILES) if lora.adapter and is_new else None
        for chunk in chunks:
            _attach(chunk, lora, shape)
            own = dict(chunk.named_parameters())
            for rule in rules(weights.chunk_rules(chunk, shape, layout), lora):
                parameter = own[rule.target]
                if folder is not None:
                    named = replace(rule, sources=tuple(PREFIX + name for name in rule.sources))
                    weights.fill(parameter, named, folder, chunk.vocab_size, shape, layout)
                elif is_new and rule.target.endswith(".a"):
                    ranks = layout.tp if rule.cut == "columns" else 1
                    whole = _initial_a(lora, model.megatron.seed, rule.sources[0], parameter.shape[1] * ranks)
                    parameter.copy_(whole.chunk(ranks, dim=1)[layout.tp_rank if ranks > 1 else 0])


def _initial_a(lora: Lora, seed: int, name: str, columns: int) -> Tensor:
    """A of the projection whose A has this name in PEFT, before training: FP32 [r, columns] on the CPU, a function of the
    seed and the name alone.

    `kaiming` is uniform in ± 1 / √columns (PEFT's default); `gaussian` is normal with deviation 1 / r.
    """
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    if lora.init == "gaussian":
        return torch.randn(lora.rank, columns, generator=generator) / lora.rank
    return (torch.rand(lora.rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
