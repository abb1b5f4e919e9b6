"""Token embedding over a vocabulary that is split across the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd import Function

from sftd.trainer.model.gradients import mark_accumulated


class _Lookup(Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, rows: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(rows)
        return weight[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        weight: Any = ctx.weight
        grad = grads[0].flatten(0, -2)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            return weight.new_zeros(weight.shape).index_add_(0, rows.flatten(), grad), None
        # PyTorch would make a gradient of the whole matrix: mostly zeros to write, read and add.
        main_grad.index_add_(0, rows.flatten(), grad.to(main_grad.dtype))
        return mark_accumulated(weight), None


def embed(embedding: Any, tokens: Tensor, *, sequence_parallel: bool) -> Tensor:
    """Rows of Megatron's `LanguageModelEmbedding` for tokens int64 [b, s]: [s, b, h], or with sequence parallelism this
    rank's share of s. Backward adds the weight's gradient to Megatron's FP32 `main_grad` if the weight has one."""
    weight = embedding.word_embeddings.weight
    columns = tokens.t().contiguous()
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return cast(Tensor, _Lookup.apply(weight, columns))
    local = columns - parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    is_mine = (local >= 0) & (local < weight.shape[0])
    found = _Lookup.apply(weight, local.where(is_mine, 0)) * is_mine[..., None]
    if sequence_parallel:
        return cast(Tensor, reduce_scatter_to_sequence_parallel_region(found))
    return cast(Tensor, reduce_from_tensor_model_parallel_region(found))
