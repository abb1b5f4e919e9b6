"""The two passes of `kernels/cross_entropy.py` in PyTorch, for tensors that are not on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose entropy is summed at a time: all at once would need another copy of the logits.
_ROWS = 64


def sums(logits: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row-wise over the first `width` columns of logits [n, w]: the maximum, Σ exp(logit − maximum), the logit at `index`
    int64 [n] (0 where `index` is negative), and Σ exp(logit − maximum) · (logit − maximum). Each FP32 [n]."""
    scores = logits[:, :width].float()
    if not width:
        return (
            scores.new_full(index.shape, float("-inf")),
            *scores.new_zeros(3, *index.shape),
        )
    highest = scores.amax(dim=-1)
    target = torch.where(index >= 0, scores.gather(1, index.clamp(min=0)[:, None]).squeeze(1), 0.0)
    powers = (scores - highest[:, None]).exp_()
    moment = torch.empty_like(highest)
    for start in range(0, highest.numel(), _ROWS):
        rows = slice(start, start + _ROWS)
        moment[rows] = (scores[rows] - highest[rows, None]).mul_(powers[rows]).sum(dim=-1)
    return highest, powers.sum(dim=-1), target, moment


def gradient_(logits: Tensor, index: Tensor, log_total: Tensor, weight: Tensor, width: int) -> None:
    """Overwrite logits [n, w] with (exp(logit − log_total) − [column = index]) · weight, and with 0 from column `width`."""
    share = (logits[:, :width].float() - log_total[:, None]).exp_()
    mine = (index >= 0).nonzero().squeeze(1)
    share[mine, index[mine]] -= 1.0
    logits[:, :width] = share.mul_(weight[:, None])
    logits[:, width:] = 0.0
