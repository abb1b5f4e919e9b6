"""Rules that convert tensors of a Hugging Face folder to Megatron's parameters and back, and those of Llama's relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape


@dataclass(frozen=True)
class Join:
    """Conversion between tensors of the folder and one parameter. `join` accepts whole tensors or this rank's shares of
    them; `split` accepts the whole parameter."""

    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]


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
class OfExpert:
    """Expert `number` of a tensor that holds all experts [experts, …]: `apart` converts its part to the tensors that `Rule.how`
    joins, `together` is the inverse."""

    number: int
    apart: Callable[[Tensor], list[Tensor]]
    together: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Rule:
    """One parameter: `target` is its name in Megatron, `sources` are its tensors in the folder.

    `cut`: how tensor-parallel ranks split each source: not at all, by rows, by columns, or by rows after padding the
    vocabulary to a multiple of the ranks. `parts`: if the first source holds several tensors one below the other, the number of
    rows of each; they are split and joined like sources. `expert`: if the source holds a tensor for each expert, which one this is.
    """

    target: str
    sources: tuple[str, ...]
    cut: Cut = "whole"
    how: Join = ONE
    parts: Callable[[ModelShape], tuple[int, ...]] | None = None
    expert: OfExpert | None = None

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        """The tensors of the folder, or an expert's parts of them, from the whole parameter."""
        parts = self.how.split(whole, shape)
        if self.expert is not None:
            return [self.expert.together(parts)]
        count = 1 if self.parts is None else len(self.parts(shape))
        return [torch.cat(parts[:count]), *parts[count:]]

    def below(self, target: str, source: str) -> Rule:
        """The rule with prefixed names."""
        return replace(self, target=target + self.target, sources=tuple(source + s for s in self.sources))


# Where the norms of `Family.norms` lie in DecoderLayer.
_NORMS = {
    "before": ("input_layernorm", "pre_mlp_layernorm"),
    "after": ("post_attention_norm", "post_mlp_norm"),
    "both": ("input_layernorm", "post_attention_norm", "pre_mlp_layernorm", "post_mlp_norm"),
}


def norm_rules(shape: ModelShape) -> list[Rule]:
    """The norms of a layer's hidden states."""
    names = zip(_NORMS[shape.norm_place], FAMILIES[shape.architecture].norms, strict=True)
    return [Rule(f"{target}.weight", (f"{source}.weight",)) for target, source in names]


def attention_rules(shape: ModelShape) -> list[Rule]:
    """Attention with the options of the shape, under Llama's names."""
    fused, qkv = FAMILIES[shape.architecture].fused.get("qkv"), "self_attention.linear_qkv"
    sources = (fused,) if fused else ("q_proj", "k_proj", "v_proj")
    rules = [
        Rule(
            f"{qkv}.weight",
            tuple(f"{s}.weight" for s in sources),
            "rows",
            GROUPED,
            _qkv_rows if fused else None,
        ),
        Rule("self_attention.linear_proj.weight", ("o_proj.weight",), "columns"),
    ]
    if shape.attention_bias:
        rules.append(Rule(f"{qkv}.bias", tuple(f"{s}.bias" for s in sources), "rows", GROUPED))
    if shape.output_bias:
        rules.append(Rule("self_attention.linear_proj.bias", ("o_proj.bias",)))
    if shape.attention_sinks:
        rules.append(Rule("self_attention.core_attention.sinks", ("sinks",), "rows"))
    if shape.qk_norm:
        rules += _qk_norms(shape)
    return [rule.below("", "self_attn.") for rule in rules]


def _qk_norms(shape: ModelShape) -> list[Rule]:
    if shape.qk_norm_over_heads:
        return [Rule(f"{x}_norm.weight", (f"{x[0]}_norm.weight",), "rows") for x in ("query", "key")]
    return [Rule(f"self_attention.{x}_layernorm.weight", (f"{x}_norm.weight",)) for x in "qk"]


def _qkv_rows(shape: ModelShape) -> tuple[int, ...]:
    heads, groups = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return heads, groups, groups


def feed_forward_rules(shape: ModelShape, size: int) -> list[Rule]:
    """A gated MLP of `size` units, or an expert."""
    family = FAMILIES[shape.architecture]
    gate, up, down = family.projections
    fused = family.fused.get("gate_up")
    sources = tuple(f"{name}.weight" for name in ((fused,) if fused else (gate, up)))
    return [
        Rule("linear_fc1.weight", sources, "rows", STACKED, (lambda _: (size, size)) if fused else None),
        Rule("linear_fc2.weight", (f"{down}.weight",), "columns"),
    ]


def expert_rules(shape: ModelShape, experts: range) -> list[Rule]:
    """The router, the given experts and the shared one of an MoE layer. A rank that holds only some of the experts holds them
    unsplit."""
    family = FAMILIES[shape.architecture]
    where = family.feed_forward
    expert = feed_forward_rules(shape, shape.moe_intermediate_size)
    if len(experts) < shape.num_experts:
        expert = [replace(rule, cut="whole") for rule in expert]
    rules = [Rule("mlp.router.weight", (f"{where}.gate.weight",))]
    if shape.router == "sigmoid":
        rules.append(Rule("mlp.router.correction.values", (f"{where}.gate.e_score_correction_bias",)))
    if size := shape.shared_expert_intermediate_size:
        shared = f"{where}.{family.shared_expert}"
        rules += [rule.below("mlp.shared_experts.", f"{shared}.") for rule in feed_forward_rules(shape, size)]
        if shape.shared_expert_gate:
            rules.append(Rule("mlp.shared_experts.gate_weight", (f"{shared}_gate.weight",)))
    for local, number in enumerate(experts):
        names = f"mlp.experts.local_experts.{local}.", f"{where}.experts.{number}."
        rules += [rule.below(*names) for rule in expert]
    return rules


def layer_rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
    """All parameters of a layer of Llama or one of its relatives, dense or MoE."""
    return [*norm_rules(shape), *attention_rules(shape), *mlp_rules(shape, layer, experts)]


def mlp_rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
    """A layer's MLP, or its router and experts."""
    if shape.has_experts(layer):
        return expert_rules(shape, experts)
    where = FAMILIES[shape.architecture].feed_forward
    dense = feed_forward_rules(shape, shape.intermediate_size)
    return [rule.below("mlp.", f"{where}.") for rule in dense]
