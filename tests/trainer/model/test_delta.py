"""The gated delta rule in chunks against the recurrence that defines it, and samples against each other. In this process."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

# Of samples in one row: one chunk, many, less than one, a single token.
ENDS = (0, 64, 214, 221, 222, 400)
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 16, 24


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v, decay, beta."""
    import torch

    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(tokens, KEY_HEADS, KEY_DIM, generator=g) for _ in range(2))
    v = torch.randn(tokens, VALUE_HEADS, VALUE_DIM, generator=g)
    # Some decay to nothing within a chunk, where a quotient of decays would overflow.
    decay = -torch.randn(tokens, VALUE_HEADS, generator=g).exp() * torch.tensor([0.01, 0.1, 1, 1, 4, 16])
    beta = torch.rand(tokens, VALUE_HEADS, generator=g)
    return [x.requires_grad_() for x in (q, k, v, decay, beta)]


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The definition, for one sample, in FP64."""
    import torch

    q, k = (
        (x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(3, 1)
        for x in (q, k)
    )
    state, outs = torch.zeros(VALUE_HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64), []
    for t in range(q.shape[0]):
        state = state * decay[t].double().exp()[:, None, None]
        error = v[t].double() - torch.einsum("hde,hd->he", state, k[t])
        state = state + torch.einsum("hd,he->hde", k[t], error * beta[t].double()[:, None])
        outs.append(torch.einsum("hde,hd->he", state, q[t]) / KEY_DIM**0.5)
    return torch.stack(outs)


def chunked(x: list[Tensor], ends: tuple[int, ...], rows: int = 1) -> Tensor:
    import torch

    from sftd.trainer.model.delta.rule import gated_delta_rule
    from sftd.trainer.model.delta.segments import chunks_of

    return gated_delta_rule(*x, chunks_of(ends, rows, torch.device("cpu")))


def test_the_rule_and_its_gradients_are_those_of_the_recurrence_of_each_sample() -> None:
    import torch

    x = inputs(ENDS[-1])
    found = chunked(x, ENDS)
    expected = torch.cat([recurrence(*(part[a:b] for part in x)) for a, b in pairwise(ENDS)])
    assert (found - expected).abs().max() < 1e-5
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    gradients = (torch.autograd.grad((y * weight).sum(), x) for y in (found, expected))
    for name, mine, truth in zip("qkvgb", *gradients, strict=True):
        assert (mine - truth).abs().max() < 1e-5 * max(1.0, truth.abs().max().item()), name


def test_a_sample_has_the_same_bits_alone_packed_and_in_a_padded_row() -> None:
    import torch

    x = [part.detach() for part in inputs(ENDS[-1])]
    packed = chunked(x, ENDS)
    samples = [[part[a:b] for part in x] for a, b in pairwise(ENDS)]
    for sample, (a, b) in zip(samples, pairwise(ENDS), strict=True):
        assert torch.equal(chunked(sample, (0, b - a)), packed[a:b])
    # Rows of [s, b]: the second is padded at its end.
    length = ENDS[2] - ENDS[1]
    rows = [
        torch.stack([one, torch.nn.functional.pad(two, (*[0, 0] * (two.dim() - 1), 0, length - 64))], 1)
        for one, two in zip(samples[1], samples[0], strict=True)
    ]
    padded = chunked([part.flatten(0, 1) for part in rows], (0, length), rows=2).unflatten(0, (-1, 2))
    assert torch.equal(padded[:, 0], packed[64:214])
    assert torch.equal(padded[:64, 1], packed[:64])


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_convolution_sees_its_own_sample_only(*, is_packed: bool) -> None:
    import torch

    from sftd.trainer.model.delta.rule import convolve

    g = torch.Generator().manual_seed(5)
    ends = (0, 2, 9, 20) if is_packed else (0, 20)
    rows = 1 if is_packed else 3
    x, weight = torch.randn(20, rows, 6, generator=g), torch.randn(6, 4, generator=g)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    parts = [
        torch.nn.functional.conv1d(x[a:b].permute(1, 2, 0), weight[:, None], padding=3, groups=6)[
            ..., : b - a
        ]
        for a, b in pairwise(ends)
    ]
    expected = torch.nn.functional.silu(torch.cat(parts, -1).permute(2, 0, 1))
    assert (convolve(x, weight, positions) - expected).abs().max() < 1e-5
