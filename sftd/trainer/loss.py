"""Cross-entropy over a vocabulary that is split across the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sftd.wire.dataset import IGNORE_INDEX


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, vocab_size: int | None
    ) -> Tensor:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        group = parallel_state.get_tensor_model_parallel_group()
        width = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * width
        scores = logits.reshape(-1, width).to(torch.float32, copy=True)
        if vocab_size is not None and first + width > vocab_size:
            scores[:, max(0, vocab_size - first) :] = float("-inf")
        flat = labels.reshape(-1)
        is_trained = flat != ignore_index
        is_mine = is_trained & (flat >= first) & (flat < first + width)
        index = torch.where(is_mine, flat - first, 0)

        highest = scores.amax(dim=-1)
        if ranks > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        scores.sub_(highest[:, None])
        target = torch.where(is_mine, scores.gather(1, index[:, None]).squeeze(1), 0.0)
        probabilities = scores.exp_()
        total = probabilities.sum(dim=-1)
        if ranks > 1:
            both = torch.stack((target, total))
            dist.all_reduce(both, group=group)
            target, total = both
        loss = torch.where(is_trained, total.log() - target, 0.0)
        probabilities.div_(total[:, None])
        ctx.save_for_backward(probabilities, index, is_mine, is_trained)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, is_mine, is_trained = ctx.saved_tensors
        # d loss / d logit = probability − [is the label]. The saved tensor is used up: backward runs once.
        grad = probabilities
        rows = torch.arange(index.numel(), device=index.device)
        grad[rows, index] -= is_mine.to(grad.dtype)
        grad.mul_(torch.where(is_trained, grad_outputs[0].reshape(-1), 0.0)[:, None])
        return grad.view(ctx.shape).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, *, vocab_size: int | None = None
) -> Tensor:
    """Per-token cross-entropy `log Σ exp(logits) − logits[label]` in nats, in FP32 (Shoeybi et al. 2019, §3).

    logits: [..., vocabulary / TP], this rank's share, any float dtype. labels: int64 [...], the same on every
    tensor-parallel rank. `vocab_size` is the real vocabulary where the logits have padding rows behind it.
    Returns FP32 [...]: 0 where the label is `ignore_index`. Differentiable in `logits`, once.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, ignore_index, vocab_size)
