"""NF4: the code book, its rounding, the same bits in every share of a matrix. MXFP4, in which gpt-oss is published, and the
activation of its experts."""

from __future__ import annotations

import warnings
import weakref
from itertools import pairwise
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sftd.trainer.model import ops
from sftd.trainer.model.quantize import mxfp4, nf4

CPU = torch.device("cpu")


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def quantized(weight: Tensor) -> nf4.Quantized:
    q = nf4.Quantized(weight.shape, CPU)
    q.fill(weight)
    return q


def test_levels_are_the_quantiles_of_the_paper() -> None:
    # Eight levels above and seven below 0, evenly spaced in probability from 1/2 to the mean of 1 - 1/32 and 1 - 1/30.
    most = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = (
        [NormalDist().inv_cdf(0.5 + (most - 0.5) * i / n) for i in range(1, n + 1)] for n in (8, 7)
    )
    expected = sorted([0.0, *above, *(-x for x in below)])
    assert pytest.approx([x / expected[-1] for x in expected], abs=1e-6) == nf4.LEVELS


def test_each_value_becomes_the_nearest_level_of_its_block() -> None:
    weight = matrix(6, 256)
    weight[0, :64] = 0
    blocks = weight.unflatten(1, (-1, 64))
    scales = blocks.abs().amax(-1)
    levels = (torch.tensor(nf4.LEVELS).double() * scales[..., None].double())[:, :, None].expand(
        *blocks.shape, 16
    )
    nearest = levels.gather(-1, (levels - blocks[..., None]).abs().argmin(-1, keepdim=True)).flatten(1)
    found = quantized(weight).dequantize(torch.float32)
    torch.testing.assert_close(found.double(), nearest, rtol=1e-6, atol=0)
    assert torch.equal(quantized(found).dequantize(torch.float32), found)
    assert quantized(weight).codes[0, :32].eq(0x77).all(), "zeros have the code of 0"
    assert torch.equal(quantized(weight).dequantize(torch.bfloat16), found.bfloat16())


def test_half_way_between_two_levels_is_the_lower() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0] = 1
    weight[0, 1:16] = torch.tensor([(a + b) / 2 for a, b in pairwise(nf4.LEVELS)])
    found = quantized(weight).dequantize(torch.float32)
    assert found[0, 1:16].tolist() == pytest.approx(nf4.LEVELS[:-1])


def test_a_share_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(8, 256)
    whole = quantized(weight)
    monkeypatch.setattr(nf4, "_VALUES", 3 * 256)
    for dim in (0, 1):
        shares = [quantized(share) for share in weight.chunk(2, dim)]
        assert torch.equal(torch.cat([s.codes for s in shares], dim), whole.codes)
        assert torch.equal(torch.cat([s.scales for s in shares], dim), whole.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_stays_bad(bad: float) -> None:
    weight = matrix(1, 128)
    weight[0, 3] = bad
    found = quantized(weight).dequantize(torch.float32)
    assert not found[0, :64].sum().isfinite()
    assert found[0, 64:].isfinite().all()


@pytest.mark.filterwarnings("ignore")  # Megatron warns where it is imported
def test_a_product_dequantises_again_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    from sftd.trainer.model.quantize import products

    class Frozen:
        def _forward_impl(self, x: Tensor, weight: Tensor) -> Tensor:
            return cast(Tensor, LinearWithFrozenWeight.apply(x, weight, None, False, None))

    class Product(products._Product, Frozen):
        pass

    alive: list[weakref.ref[Tensor]] = []
    dequantize = nf4.Quantized.dequantize

    def watched(self: nf4.Quantized, dtype: torch.dtype) -> Tensor:
        found = dequantize(self, dtype)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(nf4.Quantized, "dequantize", watched)
    weight: Any = torch.nn.Parameter(torch.empty(8, 64, device="meta"), requires_grad=False)
    weight.quantized = quantized(matrix(8, 64))
    x = matrix(3, 64).requires_grad_()
    y = Product()._forward_impl(x, weight)
    assert [found() for found in alive] == [None]
    y.sum().backward()
    expected = dequantize(weight.quantized, torch.float32)
    torch.testing.assert_close(x.grad, expected.sum(0).expand(3, 64))


def test_mxfp4_values_are_those_of_transformers_converter() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Every byte, under small and large scales.
    blocks = torch.arange(256).repeat(3).to(torch.uint8).view(2, 4, 6, 16)
    scales = torch.linspace(100, 150, 48).to(torch.uint8).view(2, 4, 6)
    found = mxfp4.values(blocks, scales)
    assert found.shape == (2, 192, 4)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_in_mxfp4_only_blocks_with_scales_are_one_tensor() -> None:
    names = ["e.gate_blocks", "e.gate_scales", "e.gate_bias", "other_blocks", "a.weight"]
    assert mxfp4.stored(names) == {
        "e.gate": ("e.gate_blocks", "e.gate_scales"),
        "e.gate_bias": ("e.gate_bias",),
        "other_blocks": ("other_blocks",),
        "a.weight": ("a.weight",),
    }


def test_gpt_oss_activation_is_clamped_as_in_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate, up = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1)) * 10
    in_turn = torch.stack((gate, up), dim=-1).flatten(-2)
    of_gpt_oss: Any = SimpleNamespace(alpha=1.702, limit=7.0)
    expected = GptOssExperts._apply_gate(of_gpt_oss, in_turn)
    torch.testing.assert_close(ops.clamped_swiglu(torch.cat((gate, up), dim=-1)), expected)
