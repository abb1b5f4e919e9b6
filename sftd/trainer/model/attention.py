"""Causal attention for the layer spec, on PyTorch's SDPA: packed samples, context parallelism, a key-value cache for
answers, and the options of `ModelShape`."""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sftd.trainer.data.sequence_layout import Chunk, SequenceLayout
from sftd.trainer.model.context_parallel import gather_stream
from sftd.trainer.model.kernels import attention_options, exact_attention


class CausalAttention(MegatronModule):
    """`core_attention` of the layer spec: softmax(QKᵀ · scale)V, causal within each sample, grouped queries.

    With a window, a query sees itself and the `window` − 1 tokens before it. A window that is not shorter than the sequence
    changes no bit. Windows and attention sinks are computed by FlashAttention 2 in half precision on a GPU; on a CPU, in FP32 and
    with soft-capped scores, attention is computed in blocks of queries (`attention_options`).
    """

    # A score of each head that has no value: [heads / TP].
    sinks: Tensor | None

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
        shape = config.model_shape
        self.layer_number = layer_number
        self.scale = softmax_scale or shape.attention_scale or config.kv_channels**-0.5
        self.is_grouped = config.num_query_groups != config.num_attention_heads
        # Megatron counts layers from 1.
        self.window, self.softcap = shape.window(layer_number - 1), shape.score_softcap
        self.register_parameter("sinks", None)
        if shape.attention_sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            self.sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.sinks, True, 0, 1)

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

        Rows padded on the right need no mask, because a trained position attends only to its left.
        """
        layout = packed_seq_params
        assert isinstance(layout, SequenceLayout)
        if layout.chunks is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(q, k, v) if layout.cache is None else self._cached(q, k, v, layout)
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        if len(layout.chunks) > 1:
            key, value = gather_stream(key, value)
        # The varlen kernel supports half precision only.
        is_varlen = layout.is_packed and _is_half_on_gpu(query) and self.softcap is None
        attend = self._varlen if is_varlen else self._by_segment
        queries = query.split([chunk.query_ends[-1] for chunk in layout.chunks])
        outs = [
            attend(q, key[chunk.keys], value[chunk.keys], chunk)
            for q, chunk in zip(queries, layout.chunks, strict=True)
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(2)

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        outs = []
        for (start, stop), (first, last) in zip(
            pairwise(chunk.query_ends), pairwise(chunk.key_ends), strict=True
        ):
            mask = _last_of(stop - start, last - first, query)
            outs.append(self._attend(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], mask))
        return torch.cat(outs, dim=2).permute(2, 0, 1, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        """`mask`: the causal mask if the queries are not all of the tokens, but the last of them."""
        if self._has_options(k.shape[2]):
            if _is_half_on_gpu(q) and self.softcap is None:
                query, key, value = (x.transpose(1, 2) for x in (q, k, v))
                return self._flash(query, key, value, (None, None, q.shape[2], k.shape[2])).transpose(1, 2)
            return attention_options.blocks(
                q, k, v, self.sinks, scale=self.scale, window=self.window, softcap=self.softcap
            )
        if mask is None and exact_attention.takes(q, k, v, self.is_grouped):
            return exact_attention.attend(q, k, v, self.scale)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=self.is_grouped
        )

    def _has_options(self, keys: int) -> bool:
        """Whether attention over that number of keys is more than causal."""
        is_windowed = self.window is not None and self.window < keys
        return is_windowed or self.softcap is not None or self.sinks is not None

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, ends: tuple[Any, ...]) -> Tensor:
        return attention_options.flash(
            query, key, value, self.sinks, scale=self.scale, window=self.window, ends=ends
        )

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        ends = chunk.cu_seqlens_q, chunk.cu_seqlens_k, chunk.longest_query, chunk.longest_key
        if self._has_options(chunk.longest_key):
            return self._flash(q, k, v, ends)[:, None]
        if not self.is_grouped or _varlen_takes_groups():
            from torch.nn.attention.varlen import varlen_attn

            # Causal, aligned so that the last query sees the last key.
            options: dict[str, Any] = {"enable_gqa": True} if self.is_grouped else {}
            out: Any = varlen_attn(q, k, v, *ends, scale=self.scale, window_size=(-1, 0), **options)
        else:
            # Before torch 2.12, varlen_attn supports equal head counts only, but its kernel supports groups.
            out, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, *ends, 0.0, is_causal=True, return_debug_mask=False, scale=self.scale
            )
        return cast(Tensor, out)[:, None]

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        assert layout.cache is not None
        is_first = not any(layout.cache.lengths)
        keys, values = layout.cache.append(self.layer_number, layout.positions, k, v)
        if is_first:
            # Rows padded on the right, as in training.
            return self._attend(q, k, v)
        return attention_options.after_cached(
            q,
            keys,
            values,
            self.sinks,
            layout.positions,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The sinks' place in a checkpoint."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": metadata["dp_cp_group"],
        }
        found = make_sharded_tensors_for_checkpoint(state, prefix, {"sinks": 0}, sharded_offsets, **groups)
        return cast(dict[str, Any], found)


def _is_half_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


@cache
def _varlen_takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def _last_of(queries: int, keys: int, like: Tensor) -> Any:
    """Causal mask of the last `queries` of `keys` tokens; None if they are all of the tokens."""
    if queries == keys:
        return None
    if _is_half_on_gpu(like):
        # The fused kernels support this mask.
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
