"""Low-rank adapters (LoRA, Hu et al. 2021): `W x + scale · B A x` with a frozen W, and trained A [r, in] and B [out, r].

Each projection of the Hugging Face model has an A and a B of its own, also where Megatron computes several projections in one
product (q, k, v; gate, up), so that they map one to one to PEFT's tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from sftd.domain.model.peft import PREFIX, WEIGHTS
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Lora, Model
from sftd.trainer.data.token_keys import TokenKeys
from sftd.trainer.model import weights
from sftd.trainer.model.adapters.dropout import Dropout, product_key
from sftd.trainer.model.adapters.linears import Adapter, Adapters, adapt
from sftd.trainer.model.families.rules import ONE, Join, Rule
from sftd.trainer.model.weights import Folder
from sftd.trainer.runtime.session import Layout

# Megatron's products of a layer, and the projections in each, in the order of the `sources` of its rule.
FUSED = {
    "linear_qkv": ("q", "k", "v"),
    "linear_q": ("q",),
    "linear_proj": ("o",),
    "linear_fc1": ("gate", "up"),
    "linear_fc2": ("down",),
}
# In the names of `rules`, the projection that is a part of a tensor.
_WITHIN = re.compile(r"(?<=\.)(?:q|k|v|gate|up)\.lora_")


def _attach(
    chunk: GPTModel, weight_rules: Iterable[Rule], model: Model, shape: ModelShape, layout: Layout
) -> None:
    """Freeze the chunk and put adapters, with unset A and B = 0, beside the products that `model.lora` names."""
    lora, tokens = model.lora, TokenKeys()
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        layer.dropout_keys = tokens
    modules = dict(chunk.named_modules())
    for rule in weight_rules:
        name = rule.target.removesuffix(".weight")
        projections = FUSED.get(name.rpartition(".")[2], ())
        chosen = [p for p in projections if p in lora.projections]
        if not chosen or name == rule.target:
            continue
        linear = modules[name]
        height, width = linear.weight.shape
        is_column = isinstance(linear, ColumnParallelLinear)
        adapters = Adapters()
        adapters.scale = scale(lora)
        adapters.groups, adapters.rows = _rows(height, projections, shape)
        ranks, rank = linear.tp_group.size(), linear.tp_group.rank()
        adapters.dropout = None
        if lora.dropout:
            part = (rank, ranks) if is_column and linear.sequence_parallel else (0, 1)
            first = 0 if is_column else rank * width
            adapters.dropout = Dropout(lora.dropout, product_key(rule.sources[0]), first, part, tokens)
        for projection in chosen:
            own = adapters.groups * adapters.rows[projection][1]
            adapters[projection] = Adapter((lora.rank, width), (own, lora.rank), linear.weight)
        adapt(linear, adapters)


def _rows(
    height: int, projections: tuple[str, ...], shape: ModelShape
) -> tuple[int, dict[str, tuple[int, int]]]:
    """`groups` and `rows` of `Adapters` for a product of `height` rows."""
    if projections != FUSED["linear_qkv"]:
        each = height // len(projections)
        return 1, {name: (i * each, each) for i, name in enumerate(projections)}
    d, queries = shape.head_dim, shape.query_heads // shape.num_key_value_heads
    rows = {"q": (0, queries * d), "k": (queries * d, d), "v": ((queries + 1) * d, d)}
    return height // ((queries + 2) * d), rows


def scale(lora: Lora) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / √r (rank-stabilised, Kalajdzievski 2023)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def rules(weight_rules: Iterable[Rule], lora: Lora) -> Iterator[Rule]:
    """The adapters' parameters, from the rules of the weights: their names in Megatron and in PEFT. Where the folder has several
    projections as one tensor, PEFT knows only its name, to which the projection's is added here."""
    for rule in weight_rules:
        projections = FUSED.get(rule.target.removesuffix(".weight").rpartition(".")[2], ())
        if not projections or not rule.target.endswith(".weight"):
            continue
        names = [source.removesuffix("weight") for source in rule.sources]
        if rule.parts is not None:
            names = [f"{names[0]}{projection}." for projection in projections]
        for projection, name in zip(projections, names, strict=True):
            if projection not in lora.projections:
                continue
            target = rule.target.removesuffix("weight") + f"adapters.{projection}"
            a: Literal["whole", "columns"] = "columns" if rule.cut == "columns" else "whole"
            b: Literal["whole", "rows"] = "rows" if rule.cut == "rows" else "whole"
            yield Rule(f"{target}.a", (f"{name}lora_A.weight",), a)
            how = ONE if rule.parts is None else _part(projections.index(projection))
            yield Rule(f"{target}.b", (f"{name}lora_B.weight",), b, how, rule.parts)


def _part(number: int) -> Join:
    """Reads one of the parts of a source."""
    return Join(lambda parts, shape: parts[number], lambda whole, shape: [whole])


@torch.no_grad()
def add(chunks: list[GPTModel], model: Model, shape: ModelShape, layout: Layout, *, is_new: bool) -> None:
    """Freeze loaded chunks and put adapters beside their products. `is_new`: fill them as `model.lora` says; otherwise a
    checkpoint will. Raises `UserError`."""
    lora = model.lora
    with ExitStack() as stack:
        folder = Folder(lora.adapter, stack, [WEIGHTS]) if lora.adapter and is_new else None
        for chunk in chunks:
            weight_rules = weights.chunk_rules(chunk, shape, layout)
            _attach(chunk, weight_rules, model, shape, layout)
            own = dict(chunk.named_parameters())
            for rule in rules(weight_rules, lora):
                parameter = own[rule.target]
                if folder is not None:
                    # Several projections may be one tensor of the folder.
                    names = (_WITHIN.sub("lora_", name) for name in rule.sources)
                    named = replace(rule, sources=tuple(PREFIX + name for name in names))
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
