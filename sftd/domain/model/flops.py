"""Floating-point operations of a training step and peak rate of a device: the terms of MFU. Also device memory."""

from __future__ import annotations

import re

from sftd.domain.model.shape import ModelShape

# Dense BF16 (and FP16) peak in FLOP/s without sparsity, from NVIDIA's data sheets. The first entry whose words are all in
# the device's name applies.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
_HALF = ("bfloat16", "float16")


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters in matrix products per token: the projections of all layers and the output layer.

    A tied embedding counts once, as the output layer; an embedding lookup is no product. An MoE layer counts its router
    and the experts that a token is routed to.
    """
    heads = shape.num_attention_heads * shape.head_dim
    groups = shape.num_key_value_heads * shape.head_dim
    attention = shape.hidden_size * (heads + 2 * groups) + heads * shape.hidden_size
    if shape.num_experts:
        active = shape.num_experts_per_tok * 3 * shape.moe_intermediate_size
        feed_forward = active * shape.hidden_size + shape.num_experts * shape.hidden_size
    else:
        feed_forward = 3 * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * (attention + feed_forward) + shape.vocab_size * shape.hidden_size


def training_flops(shape: ModelShape, tokens: int, squared_lengths: float) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens in segments of Σ n² = `squared_lengths`.

    6 · (parameters in matrix products) · tokens + 6 · layers · heads · head_dim · Σ n². The first term is two
    operations per parameter and token forward and four backward (Kaplan et al. 2020). The second is QKᵀ and PV, each
    2 · n² · heads · head_dim forward, halved because attention is causal, and tripled to include the backward pass.
    Recomputed activations, norms, softmax and the optimizer are not counted (PaLM's model FLOPs).
    """
    attention = 6 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return 6.0 * matmul_parameters(shape) * tokens + float(attention) * squared_lengths


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Peak FLOP/s of dense matrix products in `dtype` (a torch dtype or its name) on the device that
    `torch.cuda.get_device_name` names; None for unknown devices and for dtypes other than BF16 and FP16."""
    if str(dtype).removeprefix("torch.") not in _HALF:
        return None
    words = set(re.split(r"[\s-]+", device_name.upper()))
    for name, peak in _PEAKS:
        if set(name.split()) <= words:
            return peak
    return None


# Total memory of a device as CUDA reports it, in GiB, by words of its name.
_GIB = (("B200", 179.0), ("H200", 139.8), ("H100 NVL", 93.1), ("H100", 79.1), ("A100", 79.1), ("L40S", 44.4))


def device_bytes(device_name: str) -> int:
    """Memory of a device in bytes, by its name; 0 if unknown."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    return next((int(size * 2**30) for name, size in _GIB if set(name.split()) <= words), 0)
