"""Causal attention with a window, attention sinks and soft-capped scores, forward and backward.

FlashAttention computes windows and sinks in half precision on a GPU. Everything else is computed in blocks of queries: exact,
deterministic, in memory that grows with a sequence and not with its square.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries whose scores are in memory at a time.
_BLOCK = 512


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int | None,
    ends: tuple[Tensor | None, Tensor | None, int, int],
) -> Tensor:
    """Attention by FlashAttention 2, which PyTorch contains: half precision on a GPU, head_dim up to 256. Deterministic in
    deterministic mode.

    query [b, n, heads, d], key and value [b, m, groups, d] → [b, n, heads, d], or without b for packed segments. The queries are
    the last of the keys. A query sees `window` keys, itself included. `ends`: ends of the segments among queries and keys, int32
    with a leading 0 (None if there are none), and the longest segments. sinks [heads]: see `blocks`.
    """
    return cast(Tensor, _Flash.apply(query, key, value, sinks, scale, window, ends))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        scale: float,
        window: int | None,
        ends: tuple[Any, ...],
    ) -> Tensor:
        options = {
            "scale": scale,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": 0,
        }
        out, lse, *random = torch.ops.aten._flash_attention_forward(
            query, key, value, *ends, 0.0, True, False, **options
        )
        if sinks is not None:
            # The kernel's backward subtracts the mean of the gradients of all scores, weighted by their probabilities. With the
            # output and the log-sum-exp of the larger softmax, it finds that of all scores and the sink.
            larger = _with_sink(lse, sinks[:, None])
            out.mul_((lse - larger).exp().transpose(-1, -2).unsqueeze(-1))
            lse = larger
        ctx.save_for_backward(query, key, value, sinks, out, lse, *random[:2])
        ctx.ends, ctx.options = ends, options
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse, *random = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, *ctx.ends, 0.0, True, *random, **ctx.options
        )
        d_sinks = None
        if sinks is not None:
            mean = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
            d_sinks = _sink_gradient(sinks, mean, lse)
        return d_query, d_key, d_value, d_sinks, None, None, None


def blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """softmax(cap(QKᵀ · scale))V with cap(x) = softcap · tanh(x / softcap), a block of queries at a time. Products
    QKᵀ have the dtype of the queries, as in transformers; the rest of the scores is FP32.

    query [b, heads, n, d], key [b, groups, m, d], value [b, groups, m, e] → [b, heads, n, e]. The queries are the last of the keys.
    A query sees `window` keys, itself included. sinks [heads]: a score of each head that takes part in its softmax and has no
    value (gpt-oss). Backward computes the scores again.
    """
    return cast(Tensor, _Blocks.apply(query, key, value, sinks, scale, window, softcap))


def after_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    positions: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`blocks` without gradients for the few newest tokens of answers of different lengths: the keys have positions 0 to m − 1, the
    queries have `positions` int64 [n, b], or [n] if all rows have the same."""
    places = positions.view(query.shape[2], -1).T[:, None, :, None]
    behind = places - torch.arange(key.shape[2], device=key.device)
    if window is None and softcap is None and sinks is None:
        # A group's heads as more queries, so that its keys are read once.
        mask = (behind >= 0).repeat(1, 1, query.shape[1] // key.shape[1], 1)
        out = F.scaled_dot_product_attention(_grouped(query, key), key, value, attn_mask=mask, scale=scale)
        return _ungrouped(out, query, slice(0, query.shape[2]))
    scores, _ = _capped(query, key, behind, scale, window, softcap)
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        shares = (scores - _with_sink(scores.logsumexp(-1), sinks[:, None]).unsqueeze(-1)).exp_()
    return _ungrouped(_grouped(shares.to(value.dtype), value) @ value, query, slice(0, query.shape[2]))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        out = query.new_empty((*query.shape[:3], value.shape[-1]))
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, seen in _blocks(query.shape[2], key.shape[2], window):
            scores, _ = _scores(query, key, rows, seen, scale, window, softcap)
            found = scores.logsumexp(-1)
            lse[:, :, rows] = found if sinks is None else _with_sink(found, sinks[:, None])
            shares = (scores - lse[:, :, rows, None]).exp_().to(value.dtype)
            out[:, :, rows] = _ungrouped(_grouped(shares, value) @ value[:, :, seen], query, rows)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.scale, ctx.window, ctx.softcap = scale, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        (grad,) = grads
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=lse.dtype), torch.zeros_like(value, dtype=lse.dtype)
        mean = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        for rows, seen in _blocks(query.shape[2], key.shape[2], ctx.window):
            scores, slope = _scores(query, key, rows, seen, ctx.scale, ctx.window, ctx.softcap)
            shares = (scores - lse[:, :, rows, None]).exp_()
            given = _grouped(grad[:, :, rows], value)
            d_value[:, :, seen] += _grouped(shares.to(grad.dtype), value).mT @ given
            d_shares = _ungrouped(given @ value[:, :, seen].mT, query, rows)
            d_scores = shares * (d_shares - mean[:, :, rows, None]) * ctx.scale
            if slope is not None:
                d_scores *= slope
            d_products = _grouped(d_scores.to(query.dtype), key)
            d_query[:, :, rows] = _ungrouped(d_products @ key[:, :, seen], query, rows)
            d_key[:, :, seen] += d_products.mT @ _grouped(query[:, :, rows], key)
        d_sinks = None if sinks is None else _sink_gradient(sinks, mean, lse)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None, None, None


def _blocks(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    """Queries of each block and the keys that at least one of them sees."""
    found = []
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        first = 0 if window is None else max(0, keys - queries + start - window + 1)
        found.append((slice(start, stop), slice(first, keys - queries + stop)))
    return found


def _scores(
    query: Tensor,
    key: Tensor,
    rows: slice,
    seen: slice,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """`_capped` of a block."""
    behind = torch.arange(rows.start, rows.stop, device=query.device)[:, None] + key.shape[2] - query.shape[2]
    behind = behind - torch.arange(seen.start, seen.stop, device=query.device)
    return _capped(query[:, :, rows], key[:, :, seen], behind, scale, window, softcap)


def _capped(
    query: Tensor, key: Tensor, behind: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [b, heads, queries, keys], at least in FP32, and the slope of the cap there. `behind` [queries, keys] or
    [b, 1, queries, keys]: how far a key is behind a query."""
    products = _grouped(query, key) @ key.mT
    scores = _ungrouped(products, query, slice(0, query.shape[2]))
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scale
    slope = None
    if softcap is not None:
        bounded = (scores / softcap).tanh()
        scores, slope = bounded * softcap, 1 - bounded * bounded
    is_hidden = behind < 0
    if window is not None:
        is_hidden |= behind >= window
    return scores.masked_fill_(is_hidden, float("-inf")), slope


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[b, heads, n, …] → [b, groups, heads of a group · n, …]."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _ungrouped(x: Tensor, query: Tensor, rows: slice) -> Tensor:
    """Inverse of `_grouped` for a block of queries."""
    return x.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)


def _with_sink(lse: Tensor, sinks: Tensor) -> Tensor:
    return torch.logaddexp(lse, sinks.to(lse.dtype))


def _sink_gradient(sinks: Tensor, mean: Tensor, lse: Tensor) -> Tensor:
    """Gradient [heads] of the sinks. mean, lse [b, heads, n] or [heads, n]: Σ gradient · output of each query, and the
    log-sum-exp of its scores and the sink."""
    each = (-(sinks[:, None].to(lse.dtype) - lse).exp() * mean).sum(-1)
    return (each if each.dim() == 1 else each.sum(0)).to(sinks.dtype)
