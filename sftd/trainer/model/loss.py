"""Vocabulary-parallel cross-entropy, with and without all logits in memory."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sftd.domain.data.rows import IGNORE_INDEX
from sftd.domain.plan.sizes import logits_chunks
from sftd.trainer.model import cross_entropy_cpu
from sftd.trainer.model.gradients import accumulate_weight_gradient, mark_accumulated


class _Found(NamedTuple):
    """Of each row: its loss and the entropy of its probabilities in nats, FP32 [n], and whether no logit is above its label's,
    bool [n]. 0 and false where the label is ignored."""

    loss: Tensor
    entropy: Tensor
    is_right: Tensor


def _losses(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    gradient_scale: Tensor | float | None,
) -> _Found:
    """The loss of each row of logits [n, vocabulary / TP]. Unless `gradient_scale` (of all rows, or FP32 [n]) is None,
    overwrites the logits with `gradient_scale` · d loss / d logit (probability − [is the label], 0 where the label is
    ignored)."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    width = logits.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * width
    real = width if vocab_size is None else max(0, min(width, vocab_size - first))
    is_trained = labels != ignore_index
    is_mine = is_trained & (labels >= first) & (labels < first + real)
    index = torch.where(is_mine, labels - first, -1)
    kernels: Any = cross_entropy_cpu
    if logits.is_cuda:
        from sftd.trainer.model.kernels import cross_entropy as kernels
    highest, total, target, moment = kernels.sums(logits, index, real)
    if ranks > 1:
        mine = highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        lower = mine - highest
        moment = torch.where(total > 0, (moment + lower * total) * lower.exp(), 0.0)
        both = torch.stack((target, total * lower.exp()))
        dist.all_reduce(both, group=group)
        target, total = both
        # Apart: the order in which a collective adds depends on its size, and the loss keeps its bits.
        dist.all_reduce(moment, group=group)
    log_total = highest + total.log()
    if gradient_scale is not None:
        kernels.gradient_(logits, index, log_total, is_trained.float() * gradient_scale, real)
    # H = −Σ p · log p = log Σ exp(logit − highest) − Σ p · (logit − highest)
    entropy = (total.log() - moment / total).clamp(min=0.0)
    return _Found(
        torch.where(is_trained, log_total - target, 0.0),
        torch.where(is_trained, entropy, 0.0),
        is_trained & (target == highest),
    )


def _add(figures: Tensor, found: _Found, loss: Tensor, sources: Tensor | None) -> None:
    """Add some rows to `figures`, see `linear_cross_entropy`. loss: weighted, [n]. No atomics: their order would vary."""
    figures[0] += found.is_right.sum()
    figures[1] += found.entropy.sum()
    if sources is not None:
        numbers = torch.arange(figures.numel() - 2, device=figures.device)[:, None]
        figures[2:] += torch.where(sources == numbers, loss, 0.0).sum(1)
    elif figures.numel() > 2:
        figures[2] += loss.sum()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, vocab_size: int | None
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        # `_losses` overwrites its input.
        own = logits.reshape(-1, logits.shape[-1]).clone(memory_format=torch.contiguous_format)
        loss = _losses(
            own, labels.reshape(-1), ignore_index, vocab_size, 1.0 if wants_gradient else None
        ).loss
        ctx.shape = logits.shape
        if wants_gradient:
            ctx.save_for_backward(own)
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        scaled = grad * grad_outputs[0].reshape(-1, 1)
        return scaled.to(grad.dtype).view(ctx.shape), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, *, vocab_size: int | None = None
) -> Tensor:
    """Per-token cross-entropy `log Σ exp(logits) − logits[label]` in nats, in FP32 (Shoeybi et al. 2019, §3).

    logits: [..., vocabulary / TP], this rank's share, any float dtype. labels: int64 [...], the same on every
    tensor-parallel rank. `vocab_size`: size without the padding columns, if the logits have any.
    Returns FP32 [...]: 0 where the label is `ignore_index`. Differentiable in `logits`.
    """
    return cast(Tensor, _VocabParallelCrossEntropy.apply(logits, labels, ignore_index, vocab_size))


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """`softcap · tanh(logits / softcap)`, as Gemma 2 bounds its logits."""
    return (logits / softcap).tanh() * softcap


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Any,
        labels: Tensor,
        divisor: float,
        vocab_size: int | None,
        weight_is_shared: bool,
        softcap: float | None,
        wants_gradients: bool,
        weights: Tensor | None,
        figures: Tensor | None,
        sources: Tensor | None,
    ) -> Tensor:
        # ctx.needs_input_grad is true for a parameter even under no_grad.
        wants_hidden, wants_weight = (wants_gradients and need for need in ctx.needs_input_grad[:2])
        wants_any = wants_hidden or wants_weight
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = None
        if wants_weight and getattr(weight, "main_grad", None) is None:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in logits_chunks(hidden.shape[0], weight.shape[0] * weight.element_size()):
            # One buffer for the logits and then their gradient.
            logits, slope = hidden[rows] @ weight.t(), None
            if softcap is not None:
                bounded = logits.div_(softcap).tanh_()
                if wants_any:
                    slope = bounded.square().neg_().add_(1)
                bounded.mul_(softcap)
            scale = (1.0 if weights is None else weights[rows]) / divisor if wants_any else None
            found = _losses(logits, labels[rows], IGNORE_INDEX, vocab_size, scale)
            losses = found.loss if weights is None else found.loss * weights[rows]
            loss += losses.sum()
            if figures is not None:
                _add(figures, found, losses, None if sources is None else sources[rows])
            if slope is not None:
                logits *= slope
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
            if wants_weight:
                accumulate_weight_gradient(
                    hidden[rows], logits, weight.main_grad if d_weight is None else d_weight
                )
            # Otherwise this chunk would stay in memory while the next one is computed.
            del logits, slope
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight, ctx.weight_is_shared = weight, weight_is_shared
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        grad_hidden = None if d_hidden is None else d_hidden * grad_outputs[0].to(d_hidden.dtype)
        grad_weight = None
        if d_weight is not None:
            grad_weight = (d_weight * grad_outputs[0]).to(ctx.weight.dtype)
        elif ctx.needs_input_grad[1] and not ctx.weight_is_shared:
            grad_weight = mark_accumulated(ctx.weight)
        return grad_hidden, grad_weight, *[None] * 9


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    divisor: float = 1.0,
    vocab_size: int | None = None,
    weight_is_shared: bool = False,
    softcap: float | None = None,
    weights: Tensor | None = None,
    figures: Tensor | None = None,
    sources: Tensor | None = None,
) -> Tensor:
    """Σ weight · cross-entropy of `hidden @ weightᵀ` in nats ÷ `divisor`: FP32 scalar. Never holds all logits in memory.

    hidden: [n, h]; weight: [vocabulary / TP, h], this rank's rows; labels: int64 [n], -100 is not trained. Forward
    computes the gradients too, for a chunk of rows at a time. If the weight has Megatron's `main_grad`, its gradient is
    accumulated there in FP32; the gradient of the result must then be 1. `weight_is_shared`: the weight has another use
    in the same graph, which marks its gradient as complete for Megatron (a tied embedding on the same rank). `softcap`: see
    `softcapped`. weights: FP32 [n], 1 if None.

    figures: FP64 [2], or [2 + sources], to which forward adds: the number of rows whose label has the highest logit, the sum of
    their entropies −Σ p · log p in nats, and Σ weight · cross-entropy of each source. sources: int64 [n], the source of each row;
    None if all are of the first.

    The gradient of `hidden` is this rank's part of the sum over the tensor-parallel ranks.
    """
    return cast(
        Tensor,
        _LinearCrossEntropy.apply(
            hidden,
            weight,
            labels,
            divisor,
            vocab_size,
            weight_is_shared,
            softcap,
            torch.is_grad_enabled(),
            weights,
            figures,
            sources,
        ),
    )
