"""Megatron's router with the choice of `routing`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.sequence_layout import SequenceLayout
from sftd.trainer.model.moe.balance import Balance
from sftd.trainer.model.moe.routing import CorrectionBias, route


class Router(TopKRouter):
    """`correction`: the sigmoid router's bias. `balance` watches the choices."""

    correction: CorrectionBias | None

    # Of the micro-batch that the layer computes.
    layout: SequenceLayout

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._shape: ModelShape = config.model_shape
        self.balance = Balance(config)
        is_sigmoid = self._shape.router == "sigmoid"
        self.correction = (
            CorrectionBias(self.num_experts, torch.cuda.current_device()) if is_sigmoid else None
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits FP32 [s, b, experts] → (weights, 0 where an expert does not compute the token; whether it does), both
        [s · b, experts]: what Megatron's dispatcher takes."""
        logits = logits.flatten(0, 1)
        weights, experts = route(
            logits, self._shape, None if self.correction is None else self.correction.values
        )
        weights = torch.zeros_like(logits).scatter(1, experts, weights)
        is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, value=True)
        return self.balance.watch(
            weights, is_chosen, logits, self.layout, is_training=self.training
        ), is_chosen
