"""A decoder layer: Megatron's parallel matrix products with fused operations between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sftd.trainer.model import ops
from sftd.trainer.model.recompute import computed_again


class DecoderLayer(TransformerLayer):
    """Megatron's layer with its parameters, its sharding and its checkpoints, but an own forward.

    `x + attention(norm(x))`, then `x + mlp(norm(x))`. With selective recomputation the norms' outputs and the
    activation's are not kept for backward but computed again: a third less memory for a few elementwise passes.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Hidden states [s, b, h] (with sequence parallelism this rank's share of s) and the positions' cos and sin
        FP32 [2, s, d / 2] → [s, b, h]. The second output is Megatron's cross-attention context, of which there is none.
        """
        norm = self.input_layernorm
        residual, normed = ops.add_rms_norm(hidden_states, None, norm.weight, norm.eps)
        with self._recomputing(normed, norm, residual):
            qkv, _bias = self.self_attention.linear_qkv(normed)
        attended = self._attend(qkv, rotary_pos_emb, packed_seq_params)
        attended, _bias = self.self_attention.linear_proj(attended)
        norm = self.pre_mlp_layernorm
        residual, normed = ops.add_rms_norm(residual, attended, norm.weight, norm.eps)
        if self.is_moe_layer:
            out, _bias = self.mlp(normed)
            return residual + out, None
        with self._recomputing(normed, norm, residual):
            gate_up, _bias = self.mlp.linear_fc1(normed)
        activated = ops.swiglu(gate_up)
        with self._recomputing(activated, ops.swiglu, gate_up):
            out, _bias = self.mlp.linear_fc2(activated)
        return residual + out, None

    def _recomputing(
        self, tensor: Tensor, function: Callable[[Tensor], Tensor], argument: Tensor
    ) -> AbstractContextManager[None]:
        # What model.transformer_config sets for selective recomputation.
        return computed_again(tensor, function, argument) if self.recompute_input_layernorm else nullcontext()

    def _attend(self, qkv: Tensor, angles: Tensor, layout: Any) -> Tensor:
        attention = self.self_attention
        groups, head_dim = (
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
        )
        if attention.q_layernorm is None:
            q, k, v = ops.split_rotary(qkv, angles, groups, head_dim)
        else:
            q, k, v = ops.split_qkv(qkv, groups, head_dim)
            q = ops.rotate(attention.q_layernorm(q), angles)
            k = ops.rotate(attention.k_layernorm(k), angles)
        return attention.core_attention(q, k, v, None, packed_seq_params=layout)
