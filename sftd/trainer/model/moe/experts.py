"""Mixture of experts: Megatron's dropless MoELayer with SequentialMLP, which computes a rank's experts one by one; on GPUs `grouped`
computes them together.

With expert parallelism (EP) each rank holds some of the experts, unsplit; an EP group spans tensor-, context- and
data-parallel ranks of a pipeline stage. Without EP every expert is split over the tensor-parallel ranks like a dense
MLP. Tokens are dispatched by all-to-all, which gloo and NCCL both support.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec
from sftd.trainer.model import ops
from sftd.trainer.model.moe.router import Router


def config_fields(spec: Spec, shape: ModelShape) -> dict[str, Any]:
    """TransformerConfig fields for a mixture of experts; empty for a dense model. The router (`router`) computes in FP32."""
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_topk": shape.num_experts_per_tok,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": shape.shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": shape.shared_expert_gate,
        "expert_model_parallel_size": spec.model.megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": spec.model.megatron.expert_tensor_parallel_size,
    }


class SharedExpert(SharedExpertMLP):
    """The expert that every token passes: Megatron's, with the fused activation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [s, b, h] (with sequence parallelism this rank's share of s) → [s, b, h]."""
        gate_up, _bias = self.linear_fc1(hidden_states)
        out, _bias = self.linear_fc2(ops.GATED[self.config.model_shape.hidden_act](gate_up))
        if self.gate_weight is not None:
            out = out * F.linear(hidden_states, self.gate_weight).sigmoid()
        return cast(Tensor, out)


def feed_forward(spec: Any) -> Any:
    """Megatron's spec of an MoE layer's feed-forward part with the router and the shared expert of this package."""
    parts: MoESubmodules = spec.keywords["submodules"]
    shared = partial(SharedExpert, **parts.shared_experts.keywords)
    return partial(spec.func, submodules=replace(parts, router=Router, shared_experts=shared))


def mark(model: torch.nn.Module) -> None:
    """Mark the experts' parameters as reduced over the expert-data-parallel group in every layout.

    Megatron marks them only with EP; without EP, the group is the data-parallel group. The mark gives the experts their
    own optimizer. A checkpoint can be resumed with another EP only if both layouts have that optimizer.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Megatron would sum gradients of a bias over tensor-parallel ranks, which hold different experts.
            parameter.sequence_parallel = False  # type: ignore[attr-defined]


def is_counted(parameter: torch.nn.Parameter, copy: int) -> bool:
    """Whether a count of parameters includes this rank's copy. `copy`: 0 on the first data- and context-parallel rank.

    `allreduce` = False marks a parameter that is reduced over the expert-data-parallel group.
    """
    if getattr(parameter, "allreduce", True):
        return copy == 0
    return bool(parallel_state.get_expert_data_parallel_rank() == 0)
