"""A decoder layer: Megatron's parallel matrix products with fused operations between them."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sftd.trainer import ops


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
        residual, normed, forget = self._norm(self.input_layernorm, hidden_states)
        attended = self._attend(normed, rotary_pos_emb, packed_seq_params, forget)
        attended, _bias = self.self_attention.linear_proj(attended)
        residual, normed, forget = self._norm(self.pre_mlp_layernorm, residual, attended)
        if self.is_moe_layer:
            out, _bias = self.mlp(normed)
            _recompute_for(out, forget)
            return residual + out, None
        gate_up, _bias = self.mlp.linear_fc1(normed)
        _recompute_for(gate_up, forget)
        if forget is None:
            activated = ops.swiglu(gate_up)
        else:
            forget = CheckpointWithoutOutput()
            activated = forget.checkpoint(ops.swiglu, gate_up)
        out, _bias = self.mlp.linear_fc2(activated)
        _recompute_for(out, forget)
        return residual + out, None

    def _norm(
        self, norm: Any, x: Tensor, delta: Tensor | None = None
    ) -> tuple[Tensor, Tensor, CheckpointWithoutOutput | None]:
        """x + delta, its norm, and with selective recomputation what brings the norm back in backward."""
        if not self.recompute_input_layernorm:
            return *ops.add_rms_norm(x, delta, norm.weight, norm.eps), None
        total = x if delta is None else x + delta
        forget = CheckpointWithoutOutput()
        return total, forget.checkpoint(norm, total), forget

    def _attend(
        self, normed: Tensor, angles: Tensor, layout: Any, forget: CheckpointWithoutOutput | None
    ) -> Tensor:
        attention = self.self_attention
        qkv, _bias = attention.linear_qkv(normed)
        _recompute_for(qkv, forget)
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


def _recompute_for(user: Tensor, forget: CheckpointWithoutOutput | None) -> None:
    """Free the checkpointed tensor that `user` was computed from, until backward comes to `user`."""
    if forget:
        forget.discard_output_and_register_recompute(user)
