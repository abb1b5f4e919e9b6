"""The arithmetic of MFU."""

from __future__ import annotations

import msgspec
import pytest

from sftd.domain.model.flops import matmul_parameters, peak_flops, training_flops
from sftd.domain.model.shape import ModelShape
from tests.builders.plan.model_shapes import LLAMA_1B


def test_llama_1b_has_the_parameters_of_its_model_card() -> None:
    # 1,235,814,400 in all, of which 33 norms of 2048 are no matrices.
    assert matmul_parameters(LLAMA_1B) == 1_235_814_400 - 33 * 2048


def test_a_full_sequence_counts_half_of_its_square() -> None:
    length = 4096
    flops = training_flops(LLAMA_1B, length, length**2)
    # Forward per token and layer: QKᵀ and PV, each 2 · s/2 · heads · head_dim; backward twice that.
    attention = 3 * 16 * (2 * 2 * length / 2 * 32 * 64)
    assert flops / length == pytest.approx(6 * matmul_parameters(LLAMA_1B) + attention, rel=1e-12)
    # A measurement that was turned into MFU elsewhere, with the same convention.
    assert 62_368 * flops / length / 989e12 == pytest.approx(0.518, abs=5e-4)


def test_packing_shortens_attention_and_nothing_else() -> None:
    whole, halves = training_flops(LLAMA_1B, 4096, 4096**2), training_flops(LLAMA_1B, 4096, 2 * 2048**2)
    assert whole - halves == pytest.approx(6 * 16 * 32 * 64 * 4096**2 / 2, rel=1e-12)


def test_a_window_counts_the_keys_that_a_query_sees() -> None:
    windowed = msgspec.structs.replace(LLAMA_1B, sliding_window=1024, layers_without_window=(0, 1, 2, 3))
    whole, found = (training_flops(shape, 8192, 2 * 4096**2) for shape in (LLAMA_1B, windowed))
    pairs = sum(min(place + 1, 1024) for place in range(4096))
    hidden = 12 * 32 * 64 * 12 * 2 * (4096**2 / 2 - pairs)
    assert whole - found == pytest.approx(hidden, rel=1e-3)
    assert training_flops(windowed, 8192, 8 * 1024**2) == training_flops(LLAMA_1B, 8192, 8 * 1024**2)


def test_tying_the_embedding_changes_nothing() -> None:
    untied = msgspec.structs.replace(LLAMA_1B, tie_word_embeddings=False)
    assert matmul_parameters(untied) == matmul_parameters(LLAMA_1B)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        # Not a slow H200: a card of its own, which the table does not know.
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_flops(name, "torch.bfloat16") == peak_flops(name, "bfloat16") == peak


def test_no_peak_is_claimed_for_fp32() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


class _Mixtral(ModelShape, frozen=True, kw_only=True):
    """Mixtral 8x7B."""

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 14336


def test_of_the_experts_only_those_count_that_a_token_is_sent_to() -> None:
    shape = _Mixtral(
        architecture="MixtralForCausalLM",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm=False,
    )
    # Of the 46.7 billion of its model card, six of eight experts, the embedding and 65 norms are in no product.
    idle = 32 * 6 * 3 * 4096 * 14336 + 32000 * 4096 + 65 * 4096
    assert matmul_parameters(shape) == 46_702_792_704 - idle


def test_a_gated_delta_net_counts_its_recurrence_and_no_attention() -> None:
    sizes = {"delta_key_heads": 4, "delta_value_heads": 8, "delta_key_dim": 64, "delta_value_dim": 128}
    shape = msgspec.structs.replace(LLAMA_1B, delta_layers=tuple(range(12)), delta_kernel=4, **sizes)
    products = 6 * matmul_parameters(shape) * 100
    # Twelve of sixteen layers: forward reads, writes and reads the state of each value head, backward twice that.
    recurrences = 12 * 3 * (3 * 2 * 8 * 64 * 128) * 100
    attention = training_flops(LLAMA_1B, 100, 50**2) - 6 * matmul_parameters(LLAMA_1B) * 100
    assert training_flops(shape, 100, 50**2) == pytest.approx(
        products + recurrences + attention / 4, rel=1e-12
    )
