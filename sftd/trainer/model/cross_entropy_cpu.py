"""The two passes of `kernels/cross_entropy.py` in PyTorch, for tensors that are not on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def sums(logits: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise over the first `width` columns of logits [n, w]: the maximum, Σ exp(logit − maximum), and the logit at
    `index` int64 [n] (0 where `index` is negative). Each FP32 [n]."""
    scores = logits[:, :width].float()
    if not width:
        return (
            scores.new_full(index.shape, float("-inf")),
            scores.new_zeros(index.shape),
            scores.new_zeros(index.shape),
        )
    highest = scores.amax(dim=-1)
    target = torch.where(index >= 0, scores.gather(1, index.clamp(min=0)[:, None]).squeeze(1), 0.0)
    return highest, (scores - highest[:, None]).exp_().sum(dim=-1), target


def gradient_(logits: Tensor, index: Tensor, log_total: Tensor, weight: Tensor, width: int) -> None:
    """Overwrite logits [n, w] with (exp(logit − log_total) − [column = index]) · weight, and with 0 from column `width`."""
    share = (logits[:, :width].float() - log_total[:, None]).exp_()
    mine = (index >= 0).nonzero().squeeze(1)
    share[mine, index[mine]] -= 1.0
    logits[:, :width] = share.mul_(weight[:, None])
    logits[:, width:] = 0.0
