"""Which experts compute a token, and what their outputs are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from sftd.domain.model.shape import ModelShape


def route(logits: Tensor, shape: ModelShape, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits FP32 [tokens, experts] → (weights FP32, experts int64), both [tokens, k]. `bias` FP32 [experts]: the
    sigmoid router's, which is added to the scores for the choice only (Wang et al. 2024).

    Among equal scores, the expert with the lowest number is taken. Sorting is stable and nothing is added atomically, so the
    result repeats its bits.
    """
    k = shape.num_experts_per_tok
    if shape.router == "softmax":
        if shape.norm_topk_prob:
            # The softmax over the chosen logits equals the normalised softmax over all of them.
            chosen, experts = _best(logits, k)
            weights = chosen.softmax(dim=-1)
        else:
            weights, experts = _best(logits.softmax(dim=-1), k)
    else:
        assert bias is not None
        scores = logits.sigmoid()
        _, experts = _best(_of_best_groups(scores.detach() + bias, shape), k)
        weights = scores.gather(1, experts)
        if shape.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * shape.routed_scaling_factor if shape.routed_scaling_factor != 1.0 else weights, experts


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their places, the largest first."""
    # A copy, which lets go of the places of all scores; the gradient then needs only these.
    places = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
    return scores.gather(1, places), places


def _of_best_groups(scores: Tensor, shape: ModelShape) -> Tensor:
    """The scores of the `router_topk_group` groups of experts with the largest sums of their two best scores; -inf elsewhere
    (DeepSeek-AI 2024)."""
    if shape.router_topk_group >= shape.router_groups:
        return scores
    grouped = scores.unflatten(-1, (shape.router_groups, -1))
    _, groups = _best(grouped.topk(2, dim=-1).values.sum(dim=-1), shape.router_topk_group)
    is_chosen = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, groups, value=True)
    return grouped.masked_fill(~is_chosen[..., None], float("-inf")).flatten(1)


class CorrectionBias(torch.nn.Module):
    """The sigmoid router's bias: `values` FP32 [experts], a buffer, which no training changes, in FP32 in every model."""

    values: Tensor

    def __init__(self, experts: int, device: torch.device | int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(experts, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Megatron casts a BF16 model with its buffers.
        before = self.values
        super()._apply(fn, recurse)
        self.values = before.to(self.values.device)
        return self
