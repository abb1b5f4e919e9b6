"""A decoder layer: Megatron's parallel matrix products with fused operations between them.

A family with different layers overrides methods of `DecoderLayer`, or puts other modules into Megatron's spec.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.data.token_keys import TokenKeys
from sftd.trainer.model import ops
from sftd.trainer.model.attention import CausalAttention
from sftd.trainer.model.moe import experts
from sftd.trainer.model.norm import HeadsNorm, RMSNorm
from sftd.trainer.model.quantize import products
from sftd.trainer.model.recompute import computed_again
from sftd.trainer.model.rope import for_layer, grown


class DecoderLayer(TransformerLayer):
    """Megatron's layer (parameters, sharding, checkpoints) with its own forward.

    `x + attention(norm(x))`, then `x + mlp(norm(x))`; `ModelShape.norm_place` puts norms after attention and MLP too, or
    instead. With selective recomputation, backward recomputes the outputs of the norms before them and the activation: a
    third less memory for a few elementwise passes.
    """

    # With adapters: where their products look for the keys of a micro-batch's tokens.
    dropout_keys: TokenKeys | None = None

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        shape = self.shape = config.model_shape
        # Megatron counts from 1, and over all stages.
        self.number = self.layer_number - 1
        # Norms of what attention and MLP add to the residual stream.
        self.post_attention_norm, self.post_mlp_norm = (
            None if shape.norm_place == "before" else RMSNorm(config, shape.hidden_size, shape.rms_norm_eps)
            for _ in range(2)
        )
        if shape.qk_norm_over_heads:
            self.query_norm = HeadsNorm(config, shape.num_attention_heads)
            self.key_norm = HeadsNorm(config, shape.num_key_value_heads)
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
        """Hidden states [s, b, h] (with sequence parallelism this rank's share of s) and the positions' cosines and sines
        (`RotaryEmbedding`) → [s, b, h]. The second output is Megatron's cross-attention context, always None.
        """
        if self.dropout_keys is not None:
            # Here, because recomputation may run a layer of an earlier micro-batch.
            self.dropout_keys.current = packed_seq_params.dropout_keys
        if self.number == 0 and self.shape.embedding_scale != 1.0:
            # Rounded as transformers rounds it.
            hidden_states = hidden_states * hidden_states.new_tensor(self.shape.embedding_scale)
        if self.is_moe_layer:
            self.mlp.router.layout = packed_seq_params
        residual, normed = _normed(hidden_states, None, self.input_layernorm)
        with self._recomputing(normed, self.input_layernorm, residual):
            qkv = self.project_in(normed)
        added = self.project(self.attend(qkv, rotary_pos_emb, packed_seq_params))
        if self.post_attention_norm is not None:
            added = self.post_attention_norm(added)
        residual, normed = _normed(residual, added, self.pre_mlp_layernorm)
        added = self.feed_forward(normed, residual)
        if self.post_mlp_norm is not None:
            added = self.post_mlp_norm(added)
        return residual + added, None

    def project_in(self, normed: Tensor) -> Any:
        """What `attend` takes, from [s, b, h]: Megatron's qkv [s, b, …]."""
        qkv, _bias = self.self_attention.linear_qkv(normed)
        return qkv

    def project(self, attended: Tensor) -> Tensor:
        """Output projection of attention: [s, b, heads · d] → [s, b, h]."""
        out, bias = self.self_attention.linear_proj(attended)
        return cast(Tensor, out if bias is None else out + bias)

    def feed_forward(self, normed: Tensor, residual: Tensor) -> Tensor:
        """Output of the MLP or the experts: [s, b, h]. `normed` is the norm of `residual`."""
        if self.is_moe_layer:
            out, _bias = self.mlp(normed)
            return cast(Tensor, out)
        with self._recomputing(normed, self.pre_mlp_layernorm, residual):
            gate_up, _bias = self.mlp.linear_fc1(normed)
        activation = ops.GATED[self.shape.hidden_act]
        activated = activation(gate_up)
        with self._recomputing(activated, activation, gate_up):
            out, _bias = self.mlp.linear_fc2(activated)
        return cast(Tensor, out)

    def _recomputing(
        self, tensor: Tensor, function: Callable[[Tensor], Tensor], argument: Tensor
    ) -> AbstractContextManager[None]:
        # model.transformer_config sets this for selective recomputation.
        if not self.recompute_input_layernorm or tensor is argument:
            return nullcontext()
        return computed_again(tensor, function, argument)

    def attend(self, qkv: Any, angles: Tensor, layout: Any) -> Tensor:
        """Megatron's qkv [s, b, …] and `RotaryEmbedding`'s output → [s, b, heads · d]."""
        attention = self.self_attention
        groups, head_dim = (
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
        )
        is_rotated, is_interleaved = (
            self.number not in self.shape.layers_without_rope,
            self.shape.rope_interleaved,
        )
        is_whole = self.shape.rotary_dim == head_dim and not is_interleaved
        angles = for_layer(angles, self.shape, self.number)
        q_norm, k_norm = attention.q_layernorm, attention.k_layernorm
        if self.shape.qk_norm_over_heads:
            q_norm, k_norm = self.query_norm, self.key_norm
        gate = None
        is_plain = is_rotated and is_whole and angles.dim() == 3 and not self.shape.attention_gate
        if q_norm is None and is_plain:
            q, k, v = ops.split_rotary(qkv, angles, groups, head_dim)
        else:
            q, k, v = ops.split_qkv(qkv, groups, head_dim)
            if self.shape.attention_gate:
                q, gate = q.unflatten(2, (-1, 2)).unbind(3)
            if q_norm is not None:
                q, k = q_norm(q), k_norm(k)
            if is_rotated:
                q, k = (ops.rotate(x, angles, is_interleaved=is_interleaved) for x in (q, k))
        q = grown(q, layout.positions, self.shape)
        out = attention.core_attention(q, k, v, None, packed_seq_params=layout)
        return out if gate is None else out * gate.flatten(2).sigmoid()


def _normed(x: Tensor, delta: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta and its norm, which may be none."""
    if isinstance(norm, IdentityOp):
        total = x if delta is None else x + delta
        return total, total
    return ops.add_rms_norm(x, delta, norm.scale, norm.eps)


def decoder_layer(shape: ModelShape, module: type[DecoderLayer] = DecoderLayer, layer: int = -1) -> Any:
    """Megatron's spec of layer `layer` (default: the last) as a `module`."""
    is_normed = shape.qk_norm and not shape.qk_norm_over_heads
    has_experts = shape.has_experts(range(shape.num_hidden_layers)[layer])
    spec = get_gpt_layer_local_spec(
        num_experts=shape.num_experts if has_experts else None,
        qk_layernorm=is_normed,
        normalization="RMSNorm",
    )
    spec.module = module
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp if shape.norm_place == "after" else RMSNorm
    if has_experts:
        parts.mlp = experts.feed_forward(parts.mlp)
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if is_normed:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
