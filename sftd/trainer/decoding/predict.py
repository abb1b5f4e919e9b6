"""What the model predicts: the next token of each row, and the log-likelihoods of given tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.sizes import logits_chunks
from sftd.trainer.data.sequence_layout import SequenceLayout
from sftd.trainer.model.loss import softcapped, vocab_parallel_cross_entropy


def next_tokens(
    model: torch.nn.Module,
    tokens: Tensor,
    layout: SequenceLayout,
    last: Tensor,
    shape: ModelShape,
    *,
    temperature: float = 0.0,
    draws: Tensor | None = None,
) -> Tensor:
    """The token after position `last` int64 [b] of each row of `tokens` int64 [b, s]: int64 [b].

    The most probable one, of equals that with the lowest id; with a temperature, a sample of softmax(logits ÷ temperature) at
    `draws` FP64 [b] from [0, 1) of the cumulative distribution over ascending ids. On an inner pipeline stage: its hidden states
    [s, b, h].
    """

    def choose(hidden: Tensor, weight: Tensor) -> Tensor:
        columns = torch.arange(last.numel(), device=hidden.device)
        logits = _logits(hidden[last, columns], weight, shape)
        if not temperature:
            return _most_probable(logits, shape.vocab_size)
        assert draws is not None
        return _sampled(_gathered(logits)[:, : shape.vocab_size], temperature, draws)

    return _through(model, tokens, layout, choose)


def log_likelihoods(
    model: torch.nn.Module, tokens: Tensor, layout: SequenceLayout, places: Tensor, shape: ModelShape
) -> Tensor:
    """Of the tokens after `places` int64 [n], indices into `tokens` int64 [b, s] as [s, b]: FP32 [2, n], the log-probability in
    nats, and 1 where the token is the most probable one. On an inner pipeline stage: its hidden states [s, b, h]."""
    labels = tokens.T.reshape(-1)[places + tokens.shape[0]]

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        chosen, found = hidden.flatten(0, 1)[places], []
        for rows in logits_chunks(places.numel(), weight.shape[0] * weight.element_size()):
            logits = _logits(chosen[rows], weight, shape)
            losses = vocab_parallel_cross_entropy(logits, labels[rows], vocab_size=shape.vocab_size)
            best = _most_probable(logits, shape.vocab_size)
            found.append(torch.stack((-losses, (best == labels[rows]).float())))
        return torch.cat(found, dim=1)

    return _through(model, tokens, layout, score)


def _through(model: torch.nn.Module, tokens: Tensor, layout: SequenceLayout, context: Any) -> Tensor:
    output = model(
        tokens,
        layout.positions.view(tokens.shape[1], -1).T,
        None,
        labels=tokens,
        packed_seq_params=layout,
        output_processor=_head,
        output_processor_context=context,
    )
    return cast(Tensor, output)


def _head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Any, **_: object
) -> Tensor:
    """GPTModel's hook after the last layer."""
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    return cast(
        Tensor, context(hidden_states, output_layer.weight if output_weight is None else output_weight)
    )


def _logits(hidden: Tensor, weight: Tensor, shape: ModelShape) -> Tensor:
    """FP32 [n, vocabulary / TP]."""
    logits = hidden @ weight.t()
    return (logits if shape.logit_softcap is None else softcapped(logits, shape.logit_softcap)).float()


def _most_probable(logits: Tensor, vocab_size: int) -> Tensor:
    """Ids int64 [n] of the largest logits."""
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
    logits = logits[:, : max(0, vocab_size - first)]
    if logits.shape[1]:
        best = logits.argmax(dim=1)
        highest = logits.gather(1, best[:, None]).squeeze(1)
    else:
        best = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        highest = logits.new_full(best.shape, float("-inf"))
    # A token id is exact in FP64.
    candidates = _of_all_ranks(torch.stack((highest.double(), (best + first).double())))
    if len(candidates) == 1:
        return candidates[0][1].long()
    # The ranks hold ascending ids, and argmax finds the first of equals.
    together = torch.stack(candidates)
    rank = together[:, 0].argmax(dim=0)
    return together[:, 1].gather(0, rank[None]).squeeze(0).long()


def _gathered(logits: Tensor) -> Tensor:
    """All ranks' columns: [n, vocabulary]."""
    return torch.cat(_of_all_ranks(logits.contiguous()), dim=1)


def _of_all_ranks(mine: Tensor) -> list[Tensor]:
    """The tensors of the tensor-parallel ranks, in their order."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return [mine]
    found = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(found, mine, group=parallel_state.get_tensor_model_parallel_group())
    return found


def _sampled(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    # In FP64, so that rounding moves a boundary past a draw about never.
    cumulative = (logits.double() / temperature).softmax(dim=1).cumsum(dim=1)
    # The draw is below 1, so its product with the total is below the total: a token of probability 0 is never chosen.
    found = torch.searchsorted(cumulative, (draws[:, None] * cumulative[:, -1:]), right=True)
    return found.squeeze(1).clamp(max=logits.shape[1] - 1)
