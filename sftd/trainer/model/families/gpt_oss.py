"""gpt-oss: a tensor holds a matrix or a bias of all experts, transposed, with gate and up in turn. Its experts are never split."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model import ops
from sftd.trainer.model.families.rules import ONE, STACKED, OfExpert, Rule, attention_rules, norm_rules
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.layer import decoder_layer


class BiasedExperts(SequentialMLP):
    """A rank's experts one by one. Megatron's own adds a bias in place to a tensor that autograd needs."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows [n, h] in the order of the experts, the rows of each, and their weights [n] → weighted outputs [n, h]."""
        counts = tokens_per_expert.tolist()
        rows = zip(
            self.local_experts,
            permuted_local_hidden_states.split(counts),
            permuted_probs.split(counts),
            strict=True,
        )
        return torch.cat([_expert(*of_expert) for of_expert in rows]), None


def _expert(expert: Any, x: Tensor, weights: Tensor) -> Tensor:
    gate_up, bias = expert.linear_fc1(x)
    out, down_bias = expert.linear_fc2(ops.clamped_swiglu(gate_up + bias))
    return ((out + down_bias) * weights[:, None]).to(x.dtype)


def _layer_spec(shape: ModelShape, layer: int) -> Any:
    spec = decoder_layer(shape)
    mixture = spec.submodules.mlp
    parts: MoESubmodules = mixture.keywords["submodules"]
    experts: Any = partial(BiasedExperts, **parts.experts.keywords)
    spec.submodules.mlp = partial(mixture.func, submodules=replace(parts, experts=experts))
    return spec


def _transposed(x: Tensor) -> Tensor:
    return x.mT if x.dim() == 2 else x


def _gate_and_up(x: Tensor) -> list[Tensor]:
    rows = _transposed(x)
    return [rows[0::2], rows[1::2]]


def _in_turn(parts: list[Tensor]) -> Tensor:
    return _transposed(torch.stack(parts, dim=1).flatten(0, 1))


def _layer_rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
    rules = [Rule(f"mlp.router.{name}", (f"mlp.router.{name}",)) for name in ("weight", "bias")]
    for local, number in enumerate(experts):
        gate_up = OfExpert(number, _gate_and_up, _in_turn)
        down = OfExpert(number, lambda x: [_transposed(x)], lambda parts: _transposed(parts[0]))
        where = f"mlp.experts.local_experts.{local}."
        for target, source, how, expert in (
            ("linear_fc1", "gate_up_proj", STACKED, gate_up),
            ("linear_fc2", "down_proj", ONE, down),
        ):
            names = ((f"{target}.weight", source), (f"{target}.bias", f"{source}_bias"))
            rules += [
                Rule(where + name, (f"mlp.experts.{folder}",), how=how, expert=expert)
                for name, folder in names
            ]
    return [*norm_rules(shape), *attention_rules(shape), *rules]


FAMILY = TrainedFamily(layer_rules=_layer_rules, layer_spec=_layer_spec)
