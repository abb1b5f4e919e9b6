"""Rules that convert tensors of a Hugging Face folder to Megatron's parameters and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sftd.domain.model.shape import ModelShape


@dataclass(frozen=True)
class Join:
    """Conversion between tensors of the folder and one parameter. `join` accepts whole tensors or this rank's shares of
    them; `split` accepts the whole parameter. `stacked`: rows of the matrices that the first tensor of the folder holds one below the
    other; each is cut, and given to `join`, by itself."""

    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]
    stacked: Callable[[ModelShape], tuple[int, ...]] | None = None


def interleave(parts: list[Tensor], groups: int) -> Tensor:
    """Matrices or vectors, each of equal groups of rows → for each group its rows of all."""
    rest = parts[0].shape[1:]
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def _interleave_groups(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v rows → the layout of Megatron's linear_qkv: for each query group its queries, its key and its value."""
    return interleave(parts, parts[1].shape[0] // shape.head_dim)


def _separate_groups(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    """Inverse of `_interleave_groups`, for all groups."""
    queries = shape.query_heads // shape.num_key_value_heads
    return separate(whole, [queries * shape.head_dim, shape.head_dim, shape.head_dim])


def separate(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Inverse of `interleave`, given the rows that a group has of each part."""
    groups = whole.unflatten(0, (-1, sum(sizes))).split(tuple(sizes), dim=1)
    return [part.flatten(0, 1) for part in groups]


ONE = Join(lambda parts, shape: parts[0], lambda whole, shape: [whole])
# Gate and up projections.
STACKED = Join(lambda parts, shape: torch.cat(parts), lambda whole, shape: list(whole.chunk(2)))
# Queries, keys and values.
GROUPED = Join(_interleave_groups, _separate_groups)
Cut = Literal["whole", "rows", "columns", "vocabulary"]


@dataclass(frozen=True)
class Rule:
    """One parameter: `target` is its name in Megatron, `sources` are its tensors in the folder.

    `cut`: how tensor-parallel ranks split each source: not at all, by rows, by columns, or by rows after padding the
    vocabulary to a multiple of the ranks.
    """

    target: str
    sources: tuple[str, ...]
    cut: Cut = "whole"
    how: Join = ONE

    def below(self, target: str, source: str) -> Rule:
        """The rule with prefixed names."""
        return replace(self, target=target + self.target, sources=tuple(source + s for s in self.sources))


def expert_rules(shape: ModelShape, experts: range, where: str, expert: Sequence[Rule]) -> list[Rule]:
    """The router and the given experts of an MoE layer. `where`: their prefix in the folder. `expert`: the rules of one
    expert. A rank that holds only some of the experts holds them unsplit."""
    if len(experts) < shape.num_experts:
        expert = [replace(rule, cut="whole") for rule in expert]
    rules = [Rule("mlp.router.weight", (f"{where}gate.weight",))]
    for local, number in enumerate(experts):
        names = f"mlp.experts.local_experts.{local}.", f"{where}experts.{number}."
        rules += [rule.below(*names) for rule in expert]
    return rules
