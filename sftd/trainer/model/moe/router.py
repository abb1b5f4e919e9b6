"""The router of a mixture of experts: which experts compute a token, and what their outputs are multiplied by."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.sequence_layout import SequenceLayout
from sftd.trainer.model.moe.balance import Balance


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
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def _of_best_groups(scores: Tensor, shape: ModelShape) -> Tensor:
    """The scores of the `router_topk_group` groups of experts with the largest sums of their two best scores; -inf elsewhere
    (DeepSeek-AI 2024)."""
    if shape.router_topk_group >= shape.router_groups:
        return scores
    grouped = scores.unflatten(-1, (shape.router_groups, -1))
    _, groups = _best(grouped.topk(2, dim=-1).values.sum(dim=-1), shape.router_topk_group)
    is_chosen = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, groups, value=True)
    return grouped.masked_fill(~is_chosen[..., None], float("-inf")).flatten(1)


class Router(TopKRouter):
    """Megatron's router with `route` for its choice. `correction_bias` is the sigmoid router's bias: a buffer, which no
    training changes, in FP32 in every model. `balance` watches the choices."""

    # Of the micro-batch that the layer computes.
    layout: SequenceLayout

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._shape: ModelShape = config.model_shape
        self.balance = Balance(config)
        self.register_buffer("correction_bias", None)
        if self._shape.router == "sigmoid":
            self.correction_bias = torch.zeros(
                self.num_experts, dtype=torch.float32, device=torch.cuda.current_device()
            )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits FP32 [s, b, experts] → (weights, 0 where an expert does not compute the token; whether it does), both
        [s · b, experts]: what Megatron's dispatcher takes."""
        logits = logits.flatten(0, 1)
        weights, experts = route(logits, self._shape, self.correction_bias)
        weights = torch.zeros_like(logits).scatter(1, experts, weights)
        is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, value=True)
        return self.balance.watch(
            weights, is_chosen, logits, self.layout, is_training=self.training
        ), is_chosen

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Megatron casts a BF16 model with its buffers.
        bias = self.correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.correction_bias = bias.to(self.correction_bias.device)
        return self
