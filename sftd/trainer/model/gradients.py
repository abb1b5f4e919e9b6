"""Weight gradients of matrix products, added straight to Megatron's FP32 gradients."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def accumulate_weight_gradient(inputs: Tensor, d_outputs: Tensor, main_grad: Tensor) -> None:
    """`main_grad += d_outputsᵀ · inputs` for inputs [n, i], d_outputs [n, o] and FP32 main_grad [o, i].

    On a GPU one matrix product reads half precision and accumulates in FP32, so that no half-precision gradient is
    ever rounded, written or added.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(d_outputs.t(), inputs)
    elif inputs.is_cuda:
        torch.addmm(main_grad, d_outputs.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(d_outputs.t() @ inputs)


def mark_accumulated(weight: Any) -> Tensor:
    """What an autograd function returns as the gradient of a weight whose `main_grad` it has added to: Megatron's hook
    behind it still has to run, and looks at the mark only."""
    weight.grad_added_to_main_grad = True
    # Megatron sets this on tied weights, of whose two gradients it would expect one in the usual place.
    weight.zero_out_wgrad = False
    return torch.empty_like(weight)


class _ApexGemm:
    """Stands in for the one module of Apex that Megatron's linear layers know (layers.py:680)."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, d_outputs: Tensor, main_grad: Tensor) -> None:
        accumulate_weight_gradient(inputs, d_outputs, main_grad)


def install() -> None:
    """Have Megatron's linear layers accumulate weight gradients in place: with Apex's kernel where it is installed."""
    module: Any = layers
    if not module._grad_accum_fusion_available:
        module.fused_weight_gradient_mlp_cuda = _ApexGemm
        module._grad_accum_fusion_available = True
