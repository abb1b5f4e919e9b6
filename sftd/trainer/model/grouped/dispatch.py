"""Megatron's dispatcher of tokens to the ranks of their experts, with the order of `rows`."""

from __future__ import annotations

from typing import cast

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from sftd.trainer.model.grouped.rows import Collect, ExpertRows, Spread, descending, ends_of, rows_of_tokens


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher, which finds the experts of a rank in descending order. Where the rank has all of the experts, and
    whole ones, nothing is communicated, and the host does not wait."""

    # Of the micro-batch whose forward runs; let go with it.
    slots: Tensor
    rows: ExpertRows

    @property
    def is_local(self) -> bool:
        """Whether no other rank has experts, or parts of experts, of this rank's tokens."""
        return bool(self.ep_size == 1 and self.tp_size == 1)

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [s, b, h], routing_map bool [s · b, experts], probs FP32 [s · b, experts] → rows [s · b · k, h] and
        the weight of each FP32 [s · b · k]."""
        self.hidden_shape = hidden_states.shape
        self.routing_map, self.probs = routing_map, probs
        tokens = hidden_states.flatten(0, -2)
        here, self.tokens_per_expert = self.num_local_experts, None
        self.slots, ends = rows_of_tokens(routing_map, self.config.moe_router_topk, here)
        if self.is_local:
            self.rows = ExpertRows(ends, (tokens, self.slots))
        else:
            self.rows = ExpertRows(ends_of(self.preprocess(descending(routing_map, here))))
            self._maybe_dtoh_and_synchronize("before_permutation_1")
        rows, weights = Spread.apply(tokens, probs, routing_map, self.slots)
        return rows, weights

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, ExpertRows, Tensor]:
        """Rows in the order of this rank's experts, where they end, and their weights."""
        rows = self.rows
        del self.rows
        if not self.is_local:
            global_input_tokens, _, global_probs = super().dispatch_postprocess(
                global_input_tokens, global_probs
            )
        return global_input_tokens, rows, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs in the order in which the rows arrived."""
        return hidden_states if self.is_local else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """The sums of each token's rows, as the hidden states were."""
        slots = self.slots
        del self.slots, self.probs, self.routing_map
        return cast(Tensor, Collect.apply(permutated_local_input_tokens, slots)).view(self.hidden_shape)
