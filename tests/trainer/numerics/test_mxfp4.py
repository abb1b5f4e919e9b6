"""gpt-oss as it is published: experts in MXFP4, and their activation."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch

from sftd.trainer.model import ops
from sftd.trainer.model.quantize import mxfp4


def test_values_are_those_of_transformers_converter() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Every byte, under small and large scales.
    blocks = torch.arange(256).repeat(3).to(torch.uint8).view(2, 4, 6, 16)
    scales = torch.linspace(100, 150, 48).to(torch.uint8).view(2, 4, 6)
    found = mxfp4.values(blocks, scales)
    assert found.shape == (2, 192, 4)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_only_blocks_with_scales_are_one_tensor() -> None:
    names = ["e.gate_blocks", "e.gate_scales", "e.gate_bias", "other_blocks", "a.weight"]
    assert mxfp4.stored(names) == {
        "e.gate": ("e.gate_blocks", "e.gate_scales"),
        "e.gate_bias": ("e.gate_bias",),
        "other_blocks": ("other_blocks",),
        "a.weight": ("a.weight",),
    }


def test_the_activation_is_clamped_as_in_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate, up = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1)) * 10
    in_turn = torch.stack((gate, up), dim=-1).flatten(-2)
    of_gpt_oss: Any = SimpleNamespace(alpha=1.702, limit=7.0)
    expected = GptOssExperts._apply_gate(of_gpt_oss, in_turn)
    torch.testing.assert_close(ops.clamped_swiglu(torch.cat((gate, up), dim=-1)), expected)
