"""Weight gradients of matrix products, accumulated directly in Megatron's FP32 gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulate_weight_gradient(inputs: Tensor, d_outputs: Tensor, main_grad: Tensor) -> None:
    """`main_grad += d_outputsᵀ · inputs` for inputs [n, i], d_outputs [n, o] and FP32 main_grad [o, i].

    On a GPU one matrix product reads half precision and accumulates in FP32. The gradient is never rounded to half
    precision.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(d_outputs.t(), inputs)
    elif inputs.is_cuda:
        torch.addmm(main_grad, d_outputs.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(d_outputs.t() @ inputs)


def accumulate_grouped_weight_gradient(
    inputs: Tensor, d_outputs: Tensor, ends: Tensor, main_grad: Tensor
) -> None:
    """`accumulate_weight_gradient` for each of several matrices. main_grad: FP32 [matrices, o, i]; ends int32 [matrices]: the
    end of each one's rows.

    `grouped_mm` would write half precision, which an addition would have to read again: here one kernel adds FP32 sums.
    """
    if inputs.is_cuda:
        from sftd.trainer.model.kernels import grouped_gradient

        return grouped_gradient.accumulate(inputs, d_outputs, ends, main_grad)
    start = 0
    for gradient, end in zip(main_grad, ends.tolist(), strict=True):
        accumulate_weight_gradient(inputs[start:end], d_outputs[start:end], gradient)
        start = end
    return None


def mark_accumulated(weight: Any) -> Tensor:
    """The gradient that an autograd function returns for a weight after it added to `main_grad`: a placeholder, so that
    Megatron's hook runs. The hook reads the mark only."""
    weight.grad_added_to_main_grad = True
    # Megatron sets this on tied weights, because it expects one of their two gradients in `grad`.
    weight.zero_out_wgrad = False
    return torch.empty_like(weight)
