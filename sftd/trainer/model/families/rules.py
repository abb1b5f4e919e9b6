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
    them; `split` accepts the whole parameter."""

    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]


def _interleave_groups(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v rows → the layout of Megatron's linear_qkv: for each query group its queries, its key and its value."""
    rest = parts[0].shape[1:]
    groups = parts[1].shape[0] // shape.head_dim
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def _separate_groups(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    """Inverse of `_interleave_groups`, for all groups."""
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


def expert_rules(
    shape: ModelShape, experts: range, where: str, expert: Sequence[Rule], shared: str = ""
) -> list[Rule]:
    """The router, the given experts and the shared one of an MoE layer. `where`: their prefix in the folder. `expert`: the rules
    of one expert. `shared`: name of the shared one. A rank that holds only some of the experts holds them unsplit."""
    rules = [Rule("mlp.router.weight", (f"{where}gate.weight",))]
    if shape.router == "sigmoid":
        rules.append(Rule("mlp.router.correction_bias", (f"{where}gate.e_score_correction_bias",)))
    if shape.shared_expert_intermediate_size:
        rules += [rule.below("mlp.shared_experts.", f"{where}{shared}.") for rule in expert]
        if shape.shared_expert_gate:
            rules.append(Rule("mlp.shared_experts.gate_weight", (f"{where}{shared}_gate.weight",)))
    if len(experts) < shape.num_experts:
        expert = [replace(rule, cut="whole") for rule in expert]
    for local, number in enumerate(experts):
        names = f"mlp.experts.local_experts.{local}.", f"{where}experts.{number}."
        rules += [rule.below(*names) for rule in expert]
    return rules
