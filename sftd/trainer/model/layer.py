"""A decoder layer: Megatron's parallel matrix products with fused operations between them.

A family with different layers overrides methods of `DecoderLayer`, or puts other modules into Megatron's spec.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.token_keys import TokenKeys
from sftd.trainer.model import ops
from sftd.trainer.model.attention import CausalAttention
from sftd.trainer.model.norm import RMSNorm
from sftd.trainer.model.quantize import products
from sftd.trainer.model.recompute import computed_again


class DecoderLayer(TransformerLayer):
    """Megatron's layer (parameters, sharding, checkpoints) with its own forward.

    `x + attention(norm(x))`, then `x + mlp(norm(x))`. With selective recomputation, backward recomputes the outputs of
    the norms and the activation: a third less memory for a few elementwise passes.
    """

    # With adapters: where their products look for the keys of a micro-batch's tokens.
    dropout_keys: TokenKeys | None = None

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.quantize != "none":
            # Here, so that no more than one layer's weights are in memory as they are.
            products.empty(self)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Hidden states [s, b, h] (with sequence parallelism this rank's share of s) and the positions' cos and sin
        FP32 [2, s, d / 2] → [s, b, h]. The second output is Megatron's cross-attention context, always None.
        """
        if self.dropout_keys is not None:
            # Here, because recomputation may run a layer of an earlier micro-batch.
            self.dropout_keys.current = packed_seq_params.dropout_keys
        norm = self.input_layernorm
        residual, normed = ops.add_rms_norm(hidden_states, None, norm.weight, norm.eps)
        with self._recomputing(normed, norm, residual):
            qkv, _bias = self.self_attention.linear_qkv(normed)
        attended = self.project(self.attend(qkv, rotary_pos_emb, packed_seq_params))
        norm = self.pre_mlp_layernorm
        residual, normed = ops.add_rms_norm(residual, attended, norm.weight, norm.eps)
        return residual + self.feed_forward(normed, residual), None

    def project(self, attended: Tensor) -> Tensor:
        """Output projection of attention: [s, b, heads · d] → [s, b, h]."""
        out, _bias = self.self_attention.linear_proj(attended)
        return cast(Tensor, out)

    def feed_forward(self, normed: Tensor, residual: Tensor) -> Tensor:
        """Output of the MLP or the experts: [s, b, h]. `normed` is the norm of `residual`."""
        if self.is_moe_layer:
            out, _bias = self.mlp(normed)
            return cast(Tensor, out)
        with self._recomputing(normed, self.pre_mlp_layernorm, residual):
            gate_up, _bias = self.mlp.linear_fc1(normed)
        activated = ops.swiglu(gate_up)
        with self._recomputing(activated, ops.swiglu, gate_up):
            out, _bias = self.mlp.linear_fc2(activated)
        return cast(Tensor, out)

    def _recomputing(
        self, tensor: Tensor, function: Callable[[Tensor], Tensor], argument: Tensor
    ) -> AbstractContextManager[None]:
        # model.transformer_config sets this for selective recomputation.
        return computed_again(tensor, function, argument) if self.recompute_input_layernorm else nullcontext()

    def attend(self, qkv: Tensor, angles: Tensor, layout: Any) -> Tensor:
        """Megatron's qkv [s, b, …] → [s, b, heads · d]."""
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


def decoder_layer(shape: ModelShape, module: type[DecoderLayer] = DecoderLayer) -> Any:
    """Megatron's layer spec with layers of class `module`."""
    spec = get_gpt_layer_local_spec(
        num_experts=shape.num_experts or None, qk_layernorm=shape.qk_norm, normalization="RMSNorm"
    )
    spec.module = module
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
