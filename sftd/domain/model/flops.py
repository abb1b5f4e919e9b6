"""Floating-point operations of a training step and peak rate of a device: the terms of MFU. Also device memory."""

from __future__ import annotations

import re

from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import EMBEDDING, OUTPUT, Weight, frozen_shares, idle_layers, layer_kinds
from sftd.domain.spec.model_section import Model

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
    of_layers = sum(
        len(layers) * _times(weight, shape) * weight.rows * weight.columns
        for weights, layers in layer_kinds(shape)
        for weight in weights
        if weight.columns > 1
    )
    return of_layers + shape.vocab_size * shape.hidden_size


def _times(weight: Weight, shape: ModelShape) -> int:
    """How many of a weight a token meets in a layer."""
    return shape.num_experts_per_tok if weight.is_expert else 1


def training_flops(
    shape: ModelShape, tokens: int, squared_lengths: float, model: Model | None = None
) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens in segments of Σ n² = `squared_lengths`.

    6 · (parameters in matrix products) · tokens + 6 · layers · heads · head_dim · Σ n² (of latent attention the mean of a
    head's two widths). The first term is two
    operations per parameter and token forward and four backward (Kaplan et al. 2020). The second is QKᵀ and PV, each
    2 · n² · heads · head_dim forward, halved because attention is causal, and tripled to include the backward pass.
    With a window w, n² is 2wn − w² in segments longer than w, as if all had the length Σ n² ÷ tokens.
    A gated delta net has instead of the second term 18 · value heads · d · e for each token: its recurrence reads, writes and reads
    a state of d × e, two operations for each element, and backward takes twice that.
    Recomputed activations, norms, softmax and the optimizer are not counted (PaLM's model FLOPs).

    With `model`, a frozen matrix counts 4 instead of 6, because it has no weight gradient, and an adapter's matrices 6 per
    parameter: LoRA counts two thirds of the model's products. Decompression of a quantised matrix is not counted. Layers before
    the first trained weight have no backward: 2 for each parameter, and a third of attention.
    """
    squared_lengths = _mean_squares(shape, tokens, squared_lengths)
    nets = len(shape.delta_layers)
    widths = shape.head_dim + (shape.v_head_dim or shape.head_dim)
    attention = 3 * (shape.num_hidden_layers - nets) * shape.num_attention_heads * widths
    recurrences = 18 * nets * shape.delta_value_heads * shape.delta_key_dim * shape.delta_value_dim
    found = 6.0 * matmul_parameters(shape) * tokens + float(attention) * squared_lengths
    found += float(recurrences) * tokens
    if model is None:
        return found
    idle = idle_layers(model, shape) / shape.num_hidden_layers
    layers = matmul_parameters(shape) - shape.vocab_size * shape.hidden_size
    found -= idle * (2.0 * layers * tokens + attention * squared_lengths * 2 / 3)
    return found - 2.0 * _frozen(model, shape) * tokens + 6.0 * adapter_parameters(model, shape) * tokens


def _mean_squares(shape: ModelShape, tokens: int, squared_lengths: float) -> float:
    """Twice the pairs of query and key: mean of the layers."""
    length, window = squared_lengths / max(tokens, 1), shape.sliding_window
    if window is None or length <= window:
        return squared_lengths
    share = 1 - len(shape.layers_without_window) / shape.num_hidden_layers
    return (1 - share) * squared_lengths + share * tokens * (2 * window - window * window / length)


def adapter_parameters(model: Model, shape: ModelShape) -> int:
    """Parameters of adapters in matrix products per token: of experts those that a token is routed to."""
    chosen = model.lora.projections
    if not chosen:
        return 0
    each = sum(
        len(layers) * _times(weight, shape) * (weight.rows + weight.columns)
        for weights, layers in layer_kinds(shape)
        for weight in weights
        if weight.projection in chosen
    )
    return model.lora.rank * each


def _frozen(model: Model, shape: ModelShape) -> float:
    """Those of `matmul_parameters` that have no gradient."""
    if model.lora.rank:
        return matmul_parameters(shape)
    shares = frozen_shares(model, shape)
    output = EMBEDDING if shape.tie_word_embeddings else OUTPUT
    found = shape.vocab_size * shape.hidden_size * shares.get((-1, output), 0.0)
    if shares:
        for weights, layers in layer_kinds(shape):
            for weight in (w for w in weights if w.columns > 1):
                size = weight.rows * weight.columns * _times(weight, shape)
                found += size * sum(shares.get((layer, weight.name), 0.0) for layer in layers)
    return found


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
