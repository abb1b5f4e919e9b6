"""How evenly routers choose the experts: the losses of `model.moe`, and the load of each expert in a validation.

Each sample of a global batch counts the same, and each of its tokens; padding does not count. So the losses do not depend on
packing, micro-batches or the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd import Function

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Moe
from sftd.trainer.data.sequence_layout import SequenceLayout


class Balance:
    """Of one layer. `sums`: this rank's shares of the load-balancing and the z loss of the current step, without their
    coefficients, FP64 [2]. `chosen`: how often each expert was chosen in the current validation, int64 [experts]."""

    sums: Tensor | None = None
    chosen: Tensor | None = None

    def __init__(self, config: TransformerConfig) -> None:
        self.shape: ModelShape = config.model_shape
        self._losses: Moe = config.moe_losses
        self._global_batch: int = config.global_batch
        self._splits_sequence: bool = config.sequence_parallel
        self._is_whole = not config.sequence_parallel and config.context_parallel_size == 1

    def watch(
        self, weights: Tensor, is_chosen: Tensor, logits: Tensor, layout: SequenceLayout, *, is_training: bool
    ) -> Tensor:
        """The weights FP32 [tokens, experts], whose backward adds the gradients of the losses. `is_chosen` bool and `logits` FP32
        [tokens, experts]."""
        if layout.samples is None or layout.lengths is None:
            return weights
        samples, lengths = (self._mine(x) for x in (layout.samples, layout.lengths))
        if not is_training:
            if self.chosen is not None:
                self.chosen += (is_chosen & (samples >= 0)[:, None]).sum(dim=0)
        elif self._losses.is_used and torch.is_grad_enabled():
            # With full recomputation only the second forward has gradients.
            share = (samples >= 0) / (lengths * self._global_batch * self.shape.expert_layers)
            balancing = share @ self._unevenness(logits, is_chosen, samples, lengths, layout.sample_count)
            z = share @ logits.logsumexp(dim=-1).square()
            both = torch.stack((balancing, z)).detach().double()
            self.sums = both if self.sums is None else both + self.sums
            loss = balancing * self._losses.load_balancing_loss + z * self._losses.z_loss
            return cast(Tensor, _WithLoss.apply(weights, loss))
        return weights

    def _mine(self, of_tokens: Tensor) -> Tensor:
        """[s, b] → [tokens] of those that this rank routes."""
        if self._splits_sequence:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            of_tokens = of_tokens.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return of_tokens.flatten()

    def _unevenness(
        self, logits: Tensor, is_chosen: Tensor, samples: Tensor, lengths: Tensor, count: int
    ) -> Tensor:
        """Σ f · s over the experts, FP32 [tokens]: s is the token's score of an expert, scores adding up to 1; f is how often the
        token's sample chooses it, relative to an even choice. The mean over a sample is DeepSeek-V3's sequence-wise balance loss
        (DeepSeek-AI 2024), 1 if all experts are chosen evenly."""
        if self.shape.router == "sigmoid":
            scores = logits.sigmoid()
            scores = scores / scores.sum(dim=-1, keepdim=True)
        else:
            scores = logits.softmax(dim=-1)
        with torch.no_grad():
            is_of = samples[:, None] == torch.arange(count, device=samples.device)
            chosen = is_of.float().t() @ is_chosen.float()
            if not self._is_whole:
                dist.all_reduce(chosen, group=parallel_state.get_tensor_and_context_parallel_group())
            even = lengths * (self.shape.num_experts_per_tok / self.shape.num_experts)
            frequency = chosen[samples.clamp(min=0)] / even[:, None]
        return (scores * frequency).sum(dim=-1)


class _WithLoss(Function):
    """(x, a scalar loss) → x. The gradient of the loss is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=torch.float32, device=grads[0].device)


def _layers(chunks: Sequence[GPTModel]) -> Iterator[tuple[int, Balance]]:
    """Number and balance of each mixture of experts on this rank."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.is_moe_layer:
                yield layer.number, layer.mlp.router.balance


def take_losses(chunks: Sequence[GPTModel], device: torch.device) -> Tensor:
    """This rank's parts of the load-balancing and the z loss since the last call, means over the layers: FP64 [2]."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for _, balance in _layers(chunks):
        if balance.sums is not None:
            total += balance.sums
        balance.sums = None
    return total


def count_load(chunks: Sequence[GPTModel], device: torch.device) -> None:
    """Start to count the choices of each expert in evaluations."""
    for _, balance in _layers(chunks):
        balance.chosen = torch.zeros(balance.shape.num_experts, dtype=torch.int64, device=device)


def take_load(chunks: Sequence[GPTModel], shape: ModelShape, device: torch.device) -> dict[int, float] | None:
    """Number of each mixture of experts → share of the choices since `count_load` that went to its fullest expert; None for a
    dense model. All ranks take part. Ranks with copies of the same tokens count them alike."""
    if not shape.num_experts:
        return None
    chosen = torch.zeros(shape.num_hidden_layers, shape.num_experts, dtype=torch.int64, device=device)
    for number, balance in _layers(chunks):
        if balance.chosen is not None:
            chosen[number] = balance.chosen
        balance.chosen = None
    dist.all_reduce(chosen)
    shares = chosen.amax(dim=1).double() / chosen.sum(dim=1)
    return {number: share for number, share in enumerate(shares.tolist()) if shape.has_experts(number)}
