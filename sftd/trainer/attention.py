"""Causal attention for the layer spec: PyTorch's SDPA, packed samples, and a key-value cache for greedy answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the `length` tokens answered so far, by layer number: each [1, groups, length, head_dim]."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class SequenceLayout(PackedSeqParams):
    """Where the tokens of a micro-batch stand. Rides through GPTModel on every pipeline stage.

    It keeps Megatron's ordinary [s, b, h, d] format (`qkv_format` is not "thd"): RoPE goes by `positions`, so only
    the core attention has to know that samples are packed.

    positions: int64 [s], each token's position in its own sample.
    boundaries: ends of the packed samples with a leading 0, covering all s tokens; None when rows are not packed.
    cu_seqlens_q: the boundaries as int32 on the device, for the CUDA kernel.
    cache: set while an answer is generated.
    """

    positions: Tensor = None  # type: ignore[assignment]  # PackedSeqParams' fields all have defaults
    boundaries: list[int] | None = None
    cache: KeyValueCache | None = None


class CausalAttention(MegatronModule):
    """`core_attention` of the layer spec: softmax(QKᵀ · scale)V, causal within each sample, grouped queries."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.is_grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Query [s, b, heads, d], key and value [s, b, groups, d] → [s, b, heads · d].

        No mask is needed for rows padded on the right: a trained position only looks left.
        """
        layout = packed_seq_params
        assert isinstance(layout, SequenceLayout)
        tokens, rows = query.shape[:2]
        # The varlen kernel takes half precision only.
        if layout.boundaries is not None and query.is_cuda and query.dtype != torch.float32:
            return self._packed_cuda(query, key, value, layout).reshape(tokens, rows, -1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if layout.cache is not None:
            out = self._cached(q, k, v, layout.cache)
        elif layout.boundaries is not None:
            samples = [slice(*ends) for ends in pairwise(layout.boundaries)]
            out = torch.cat([self._sdpa(q[:, :, s], k[:, :, s], v[:, :, s]) for s in samples], dim=2)
        else:
            out = self._sdpa(q, k, v)
        return out.permute(2, 0, 1, 3).reshape(tokens, rows, -1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=self.is_grouped
        )

    def _packed_cuda(self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.squeeze(1) for x in (query, key, value))
        options: dict[str, Any] = {}
        if self.is_grouped:
            if "enable_gqa" in signature(varlen_attn).parameters:
                options["enable_gqa"] = True
            else:
                # torch before 2.12 takes equal head counts only.
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        assert layout.cu_seqlens_q is not None
        assert layout.max_seqlen_q is not None
        out = varlen_attn(
            q,
            k,
            v,
            layout.cu_seqlens_q,
            layout.cu_seqlens_q,
            layout.max_seqlen_q,
            layout.max_seqlen_q,
            scale=self.scale,
            window_size=(-1, 0),
            **options,
        )
        return cast(Tensor, out)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache) -> Tensor:
        if cache.length:
            old_k, old_v = cache.layers[self.layer_number]
            k = torch.cat((old_k[:, :, : cache.length], k), dim=2)
            v = torch.cat((old_v[:, :, : cache.length], v), dim=2)
        cache.layers[self.layer_number] = (k, v)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(cache.length)
        return self._sdpa(q, k, v, mask)
