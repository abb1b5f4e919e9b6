"""Mixture of experts: Megatron's dropless MoELayer with SequentialMLP, which computes a rank's experts one by one; on GPUs `grouped`
computes them together.

With expert parallelism (EP) each rank holds some of the experts, unsplit; an EP group spans tensor-, context- and
data-parallel ranks of a pipeline stage. Without EP every expert is split over the tensor-parallel ranks like a dense
MLP. Tokens are dispatched by all-to-all, which gloo and NCCL both support.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec


def config_fields(spec: Spec, shape: ModelShape) -> dict[str, Any]:
    """TransformerConfig fields for a mixture of experts; empty for a dense model.

    The router computes in FP32: logits, softmax over all experts, top-k, and normalisation of the top-k weights to a sum
    of 1 if the model does that. There is no load-balancing loss, as in transformers without `output_router_logits`.
    """
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_topk": shape.num_experts_per_tok,
        # A softmax over the top-k logits equals the normalised softmax over all of them.
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": spec.model.megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": spec.model.megatron.expert_tensor_parallel_size,
    }


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
