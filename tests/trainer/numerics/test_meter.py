"""MFU of a step against a number that was computed by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Model
from sftd.trainer.loop.meter import Meter


def on_gpu(dtype: torch.dtype) -> Any:
    """What a meter asks of a session."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


def test_mfu_is_the_share_of_what_all_devices_could_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four H100: two layers of width 8, two heads of 4 with one key, a feed-forward of 16 and nine tokens."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=9,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        qk_norm=False,
    )
    # Each layer: queries 64, keys and values 32 each, the projection 64, three of 128; and the output layer.
    parameters = 2 * (64 + 32 + 32 + 64 + 3 * 128) + 9 * 8
    # Samples of 3 and 5 tokens in half a second.
    flops = 6 * parameters * 8 + 6 * 2 * 2 * 4 * (9 + 25)
    meter = Meter(shape, Model(), on_gpu(torch.bfloat16))
    assert meter.mfu(8, 34.0, 0.5) == pytest.approx(flops / (0.5 * 4 * 989e12), rel=1e-12)
    assert meter.mfu(8, 34.0, 0.0) is None
    assert Meter(shape, Model(), on_gpu(torch.float32)).mfu(8, 34.0, 0.5) is None
