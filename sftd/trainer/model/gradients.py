"""Weight gradients of matrix products, added straight to Megatron's FP32 gradients."""

from __future__ import annotations

from typing import Any

import torch
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
    still has to run after it, and reads the mark only."""
    weight.grad_added_to_main_grad = True
    # Megatron sets this on tied weights, of whose two gradients it would expect one in the usual place.
    weight.zero_out_wgrad = False
    return torch.empty_like(weight)
