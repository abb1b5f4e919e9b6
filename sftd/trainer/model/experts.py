"""Mixture of experts: Megatron's MoELayer, dropless, with one MLP after the other per rank (SequentialMLP).

With expert parallelism (EP) each rank holds some experts whole, and the ranks that share them are any of a pipeline
stage: tensor-, context- and data-parallel ones. Without it every expert is split over the tensor-parallel ranks as a
dense MLP is. Tokens travel by all-to-all, which gloo and NCCL both have.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec


def config_fields(spec: Spec, shape: ModelShape) -> dict[str, Any]:
    """Fields of the TransformerConfig of a mixture of experts; none for a dense model.

    The router computes in FP32: logits, softmax over all experts, top-k; the weights of those taken sum to 1 where the
    model normalises them. There is no load-balancing loss, as in transformers without `output_router_logits`.
    """
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_topk": shape.num_experts_per_tok,
        # A softmax over the taken logits is one over all of them, normalised.
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": spec.model.megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": spec.model.megatron.expert_tensor_parallel_size,
    }


def mark(model: torch.nn.Module) -> None:
    """Mark the experts' parameters as reduced over the expert-data-parallel group in every layout.

    Megatron itself does so only with EP; without it that group is the data-parallel one. The mark gives the experts an
    optimizer of their own, and only if they have one in both layouts can a checkpoint be resumed with another EP.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def is_counted(parameter: torch.nn.Parameter, copy: int) -> bool:
    """Whether this rank's copy of a parameter, the `copy`-th from 0 (data and context parallelism), represents all of them.

    Megatron marks a parameter that is reduced over the expert-data-parallel group by `allreduce` = False.
    """
    if getattr(parameter, "allreduce", True):
        return copy == 0
    return bool(parallel_state.get_expert_data_parallel_rank() == 0)
