"""What a table of weights consists of: how tensors of a Hugging Face folder become Megatron's parameters, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sftd.domain.model.shape import ModelShape


@dataclass(frozen=True)
class Join:
    """How tensors of the folder become one parameter, and the way back. `join` takes each tensor, or of each this rank's
    share; `split` takes the whole parameter."""

    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]


def _interleave_groups(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v rows → for each query group its queries, its key and its value, as Megatron's linear_qkv has them."""
    rest = parts[0].shape[1:]
    groups = parts[1].shape[0] // shape.head_dim
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def _separate_groups(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    """The way back of `_interleave_groups`, for all groups."""
    rest, queries = whole.shape[1:], shape.num_attention_heads // shape.num_key_value_heads
    groups = whole.reshape(shape.num_key_value_heads, (queries + 2) * shape.head_dim, *rest)
    sizes = [queries * shape.head_dim, shape.head_dim, shape.head_dim]
    return [part.reshape(-1, *rest) for part in groups.split(sizes, dim=1)]


ONE = Join(lambda parts, shape: parts[0], lambda whole, shape: [whole])
# Gate and up projections.
STACKED = Join(lambda parts, shape: torch.cat(parts), lambda whole, shape: list(whole.chunk(2)))
# Queries, keys and values.
GROUPED = Join(_interleave_groups, _separate_groups)
Cut = Literal["whole", "rows", "columns", "vocabulary"]


@dataclass(frozen=True)
class Rule:
    """One parameter: `target` is its name in Megatron, `sources` the tensors in the folder that make it.

    `cut` is what tensor-parallel ranks share of each source: nothing, its rows, its columns, or its rows padded to the
    vocabulary that they share evenly.
    """

    target: str
    sources: tuple[str, ...]
    cut: Cut = "whole"
    how: Join = ONE

    def below(self, target: str, source: str) -> Rule:
        """The rule with prefixes put before its names."""
        return replace(self, target=target + self.target, sources=tuple(source + s for s in self.sources))


def expert_rules(shape: ModelShape, experts: range, where: str, expert: Sequence[Rule]) -> list[Rule]:
    """The router and these of the experts of an MoE layer, which the folder has in `where`; `expert` are the parameters of
    one. A rank that does not hold all experts holds each of them whole."""
    if len(experts) < shape.num_experts:
        expert = [replace(rule, cut="whole") for rule in expert]
    rules = [Rule("mlp.router.weight", (f"{where}gate.weight",))]
    for local, number in enumerate(experts):
        names = f"mlp.experts.local_experts.{local}.", f"{where}experts.{number}."
        rules += [rule.below(*names) for rule in expert]
    return rules
