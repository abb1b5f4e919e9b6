"""Windows and attention sinks by FlashAttention, against blocks of scores in FP32, and bit for bit the same again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sftd.trainer.model.kernels import attention_options

pytestmark = pytest.mark.gpu

HEADS, GROUPS, DIM, SCALE = 8, 2, 64, 0.11
# Name → (window, whether there are sinks).
OPTIONS = {"window": (100, False), "sinks": (None, True), "both": (33, True)}
SEGMENTS = [0, 300, 301, 812, 1024]


def inputs(queries: int, keys: int, sinks: bool, rows: int = 2) -> list[Tensor]:
    """Queries, keys and values [rows, tokens, heads or groups, d] and sinks, whose values BF16 has."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(rows, queries, HEADS, DIM), *[(rows, keys, GROUPS, DIM)] * 2, *([(HEADS,)] if sinks else [])]
    return [torch.randn(*size, generator=generator).bfloat16() for size in sizes]


def results(function: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients."""
    own = [x.to("cuda", dtype, copy=True).requires_grad_() for x in tensors]
    out = function(*own, *[None] * (4 - len(own)))
    out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype))
    return [out.detach().float(), *(x.grad.float() for x in own if x.grad is not None)]


def in_blocks(window: int | None) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        by_head = (x.transpose(1, 2) for x in (query, key, value))
        found = attention_options.blocks(*by_head, sinks, scale=SCALE, window=window, softcap=None)
        return found.transpose(1, 2)

    return attend


def by_flash(window: int | None, ends: Tensor | None = None) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"scale": SCALE, "window": window}
        sizes = query.shape[1], key.shape[1]
        if ends is None:
            return attention_options.flash(query, key, value, sinks, ends=(None, None, *sizes), **options)
        packed = (x.squeeze(0) for x in (query, key, value))
        longest = int(ends.diff().max())
        return attention_options.flash(*packed, sinks, ends=(ends, ends, longest, longest), **options)[None]

    return attend


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < 0.02 * float(b.abs().max())


@pytest.mark.parametrize(("queries", "keys"), [(500, 500), (200, 500)])
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_those_of_blocks(gpus: int, name: str, queries: int, keys: int) -> None:
    window, sinks = OPTIONS[name]
    tensors = inputs(queries, keys, sinks)
    expected = results(in_blocks(window), tensors, torch.float32)
    compare(results(by_flash(window), tensors, torch.bfloat16), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_samples_are_those_of_blocks_and_repeat_their_bits(gpus: int, name: str) -> None:
    window, sinks = OPTIONS[name]
    tensors = inputs(SEGMENTS[-1], SEGMENTS[-1], sinks, rows=1)
    sizes = [stop - start for start, stop in pairwise(SEGMENTS)]

    def apart(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        parts = zip(*(x.split(sizes, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([in_blocks(window)(*part, sinks) for part in parts], dim=1)

    ends = torch.tensor(SEGMENTS, dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (results(by_flash(window, ends), tensors, torch.bfloat16) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    compare(found, results(apart, tensors, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
