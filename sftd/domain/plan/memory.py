"""Peak memory of a rank, from the trainer's allocations. docs/plan.md derives each term.

On a GPU the bytes of tensors count, as in `torch.cuda.max_memory_allocated`; on a CPU those of the process.
"""

from __future__ import annotations

import msgspec

from sftd.domain.model.parameters import held, padded_vocabulary
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import PRODUCTS, adapted_products, frozen_shares, idle_layers, layer_weights
from sftd.domain.plan import experts
from sftd.domain.plan.batch import Workload
from sftd.domain.plan.sizes import (
    CUBLAS_BYTES,
    NF4_BYTES,
    SCORES_BYTES,
    WEIGHT_BYTES,
    checkpoint_bytes,
    chunk_layers,
    logits_chunks,
    whole_recomputed,
)
from sftd.domain.spec.spec import Spec

# A CPU process with torch and Megatron imported, and the freed activations that the C library keeps: a share of them, up
# to a limit, while gradients are reduced; and a share while activations are in memory, which is more than that where few
# parameters are trained. Measured and fitted, not derived: docs/plan.md.
PROCESS_BYTES = 850_000_000
HELD_BACK_SHARE = 0.5
HELD_BACK_MOST = 400_000_000
HELD_BACK_BEFORE = 0.3
# GPU memory besides tensors: the CUDA context, kernels and, with several ranks, buffers of about twenty NCCL groups (2.0
# and 8.8 GiB on an H100), and memory that the allocator reserves but does not use (up to 3.7 %). Measured: docs/plan.md.
GPU_OUTSIDE_BYTES = 9 << 30
GPU_OUTSIDE_ALONE_BYTES = 9 << 28
GPU_CUT_SHARE = 0.04


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Peak bytes of one rank of pipeline stage `stage`. `activations` are kept for backward. `loss` is the larger of the
    logits with their surrounding tensors, and the temporary memory of a layer's backward."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int

    @property
    def total(self) -> int:
        """Total bytes: the prediction of `peak_memory_bytes`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.workspace


def footprints(spec: Spec, shape: ModelShape, work: Workload, *, device: str, dtype: str) -> list[Footprint]:
    """The footprint of each pipeline stage. `device` is `cuda` or `cpu`, `dtype` `bfloat16` or `float32`."""
    stages = spec.model.megatron.pipeline_model_parallel_size
    return [_of_stage(spec, shape, work, stage, device, dtype) for stage in range(stages)]


def fullest(found: list[Footprint]) -> Footprint:
    """The largest footprint."""
    return max(found, key=lambda f: f.total)


def needed(footprint: Footprint, device: str, ranks: int) -> int:
    """Device bytes (host bytes on a CPU) that a rank requires, in a run of `ranks` ranks."""
    if device == "cpu":
        return footprint.total
    outside = GPU_OUTSIDE_BYTES if ranks > 1 else GPU_OUTSIDE_ALONE_BYTES
    return int(footprint.total * (1 + GPU_CUT_SHARE)) + outside


def host_copy_bytes(spec: Spec, checkpoint_bytes: int) -> int:
    """Host bytes of all ranks for the copy from which an asynchronous save writes."""
    return checkpoint_bytes if spec.checkpoint.async_save else 0


def _of_stage(
    spec: Spec, shape: ModelShape, work: Workload, stage: int, device: str, dtype: str
) -> Footprint:
    m = spec.model.megatron
    pp = m.pipeline_model_parallel_size
    mine = held(spec, shape, stage)
    width = WEIGHT_BYTES[dtype]
    state = checkpoint_bytes(spec, dtype) - width
    dense_ranks = spec.data_parallel_size * m.context_parallel_size
    expert_ranks = max(
        1, spec.world_size // (pp * m.expert_model_parallel_size * m.expert_tensor_parallel_size)
    )
    layer = _Layer(spec, shape, device, width)
    kept, again = layer.bytes_per_token()
    tokens = work.largest / m.context_parallel_size
    layers_in_flight = _layers_in_flight(spec, shape, work, stage)
    activations = layers_in_flight * kept * tokens
    if stage == 0:
        activations *= 1 - min(_idle(spec, shape), chunk_layers(spec, shape)) * pp / shape.num_hidden_layers
    if pp > 1:
        # Both stages keep the tensor that one sends to the next until backward.
        shared = m.tensor_model_parallel_size if m.sequence_parallel else 1
        activations += (
            layers_in_flight / chunk_layers(spec, shape) * width * shape.hidden_size * tokens / shared
        )
    head = _loss_bytes(spec, shape, work, tokens, device, width) if stage == pp - 1 else 0.0
    # When the scores of attention are in memory, the layer's feed-forward activations are already freed.
    scores = _score_bytes(spec, shape, work, width) if device == "cuda" else 0.0
    temporary = max(layer.backward(tokens), layer.recurrence() * tokens)
    backward = again * tokens + temporary + max(0.0, scores - layer.feed_forward() * tokens)
    joined = _joined_bytes(spec, shape, work, width)
    workspace = CUBLAS_BYTES + joined
    if device == "cpu":
        # gloo copies the gradients that it reduces. By then the activations are freed, but the C library keeps a part.
        held_back = min(HELD_BACK_SHARE * activations, HELD_BACK_MOST)
        workspace = (
            PROCESS_BYTES
            + joined
            + max(int(held_back) + 4 * mine.trained, int(HELD_BACK_BEFORE * activations))
        )
    return Footprint(
        stage=stage,
        weights=width * (mine.total - mine.quantized) + int(NF4_BYTES * mine.quantized),
        gradients=4 * mine.trained,
        optimizer=state * mine.dense // dense_ranks + state * mine.experts // expert_ranks,
        activations=int(activations),
        loss=int(max(head, backward)),
        workspace=workspace,
    )


def _joined_bytes(spec: Spec, shape: ModelShape, work: Workload, width: int) -> int:
    """Bytes of the joined matrices of adapters that one product computes, and of their FP32 gradients. The latter are there before
    the last micro-batch's activations only if there was another."""
    m, lora = spec.model.megatron, spec.model.lora
    if not lora.rank:
        return 0
    elements = 0
    for parts in adapted_products(shape):
        count = sum(weight.projection in lora.projections for weight in parts)
        here = shape.num_experts // m.expert_model_parallel_size if parts[0].is_expert else 1
        split = m.expert_tensor_parallel_size if parts[0].is_expert else m.tensor_model_parallel_size
        rows, columns = sum(weight.rows for weight in parts), parts[0].columns
        wide = rows + columns // split if parts[0].cut == "columns" else rows // split + columns
        elements += count * lora.rank * here * wide
    layers = shape.num_hidden_layers // m.pipeline_model_parallel_size
    return layers * elements * (width + (4 if work.micro_batches > 1 else 0))


def _layers_in_flight(spec: Spec, shape: ModelShape, work: Workload, stage: int) -> int:
    """Layers × micro-batches whose activations a rank of the stage holds at the same time: 1F1B, or interleaved."""
    m = spec.model.megatron
    pp, vpp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    if vpp == 1:
        return min(work.micro_batches, pp - stage) * (shape.num_hidden_layers // pp)
    warm_up = (pp - stage - 1) * 2 + (vpp - 1) * pp
    return min(work.micro_batches * vpp, warm_up + 1) * (shape.num_hidden_layers // (pp * vpp))


def _idle(spec: Spec, shape: ModelShape) -> int:
    """Number of the first layers that keep nothing for backward. A layer that is recomputed whole always has a backward."""
    return 0 if whole_recomputed(spec, shape) else idle_layers(spec.model, shape)


def _loss_bytes(
    spec: Spec, shape: ModelShape, work: Workload, tokens: float, device: str, width: int
) -> float:
    """Bytes after the last layer: final norm, hidden states of trained positions with their gradient, and logits."""
    m = spec.model.megatron
    h, tp = shape.hidden_size, m.tensor_model_parallel_size
    shared = tp if m.sequence_parallel else 1
    trained = max(1, round(work.largest_trained / m.context_parallel_size))
    # The norm's input and its output; on a CPU the normalised input too.
    around = (2 if device == "cuda" else 3) * width * h * tokens / shared
    if shared > 1:
        around += width * h * tokens
    around += 2 * width * h * trained
    row_bytes = padded_vocabulary(shape.vocab_size, tp) // tp * width
    rows: int = max(chunk.stop - chunk.start for chunk in logits_chunks(trained, row_bytes))
    # One chunk at a time; on a CPU exp needs a copy. The slope of soft-capped logits is as large.
    copies = (2 if device == "cpu" else 1) + (shape.logit_softcap is not None)
    return around + copies * rows * row_bytes


def _score_bytes(spec: Spec, shape: ModelShape, work: Workload, width: int) -> float:
    """Bytes of the scores' gradient in deterministic attention, which applies to padded rows in half precision."""
    m = spec.model.megatron
    has_options = shape.attention_sinks or shape.score_softcap is not None
    if not spec.training.deterministic or spec.training.use_rmpad or width != 2 or has_options:
        return 0.0
    rows = spec.training.micro_batch_size_per_gpu
    group = shape.num_attention_heads / shape.num_key_value_heads * (work.largest / rows) ** 2 * width
    heads = rows * max(1, shape.num_key_value_heads // m.tensor_model_parallel_size)
    # A chunk holds whole groups. A group above the limit takes another code path.
    return 0.0 if group > SCORES_BYTES else min(heads * group, SCORES_BYTES)


class _Layer:
    """Bytes of a token in one decoder layer of one rank, and of a decompressed matrix."""

    def __init__(self, spec: Spec, shape: ModelShape, device: str, width: int) -> None:
        m = spec.model.megatron
        self._spec, self._shape, self._width = spec, shape, width
        self._is_cpu = device == "cpu"
        self._tp = m.tensor_model_parallel_size
        self._shared = self._tp if m.sequence_parallel else 1
        self._cp = m.context_parallel_size
        self._adapted = spec.model.lora.projections
        self._frozen = frozen_shares(spec.model, shape)
        self._layers = range(_idle(spec, shape), shape.num_hidden_layers)

    def bytes_per_token(self) -> tuple[float, float]:
        """(kept until backward, mean of the layers; kept again while the backward of one layer runs)."""
        model = self._spec.model
        nets = len(self._shape.delta_layers) / self._shape.num_hidden_layers
        mixer = (1 - nets) * self._attention() + nets * self._delta_net()
        whole = self._residual() + mixer + self.feed_forward() + self._shrunk()
        share = whole_recomputed(self._spec, self._shape)
        hidden = self._width * self._shape.hidden_size / self._shared
        if share == 1 or not model.enable_gradient_checkpointing:
            return (hidden, whole) if share else (whole, 0.0)
        inputs = {"qkv": hidden, "gate_up": hidden, "down": self._activated()}
        if self._shape.num_experts:
            # The router keeps its norm, and Megatron's experts their activation.
            inputs = {"qkv": hidden}
            if not self._is_cpu:
                inputs["gate_up"] = experts.spared_bytes(self._spec, self._shape, self._width)
        if self._shape.norm_place == "after":
            # The inputs of both products are the residual stream itself.
            inputs = {"down": self._activated()}
        parts = [size * self._input_share(product) for product, size in inputs.items()]
        selective = whole - sum(parts)
        # The layers that are recomputed whole come last in backward: the others have been freed by then.
        others = (1 - share) * chunk_layers(self._spec, self._shape)
        return (
            share * hidden + (1 - share) * selective,
            max(*parts, whole - others * selective) if share else max(parts),
        )

    def backward(self, tokens: float) -> float:
        """Gradients of activations while the backward of one layer runs, less what has been let go; a quantised matrix is
        decompressed meanwhile."""
        s, e = self._shape, self._width
        if s.num_experts and not self._is_cpu:
            return experts.backward_bytes(self._spec, s, e) * tokens + self._decompressed()
        f = s.intermediate_size / self._tp
        if s.num_experts:
            f = s.num_experts_per_tok * s.moe_intermediate_size
            f /= self._spec.model.megatron.expert_tensor_parallel_size
        h = s.hidden_size
        gathered = h if self._shared > 1 else 0
        activation, product = 3 * f + 2 * h / self._shared, 2 * f + h + gathered + 2 * h / self._shared
        if self._adapted and not s.num_experts:
            # No buffer for a weight's gradient takes the place of the input of down, and then of gate and up.
            kept = self._input_share("down") * f
            activation -= kept
            product -= kept + 2 * f
        return max(e * activation * tokens, e * product * tokens + self._decompressed())

    def _decompressed(self) -> float:
        """Bytes of the largest matrix of a product."""
        model, s = self._spec.model, self._shape
        if model.quantize == "none":
            return 0.0
        f, split = s.intermediate_size, self._tp
        if s.num_experts:
            f, split = s.moe_intermediate_size, model.megatron.expert_tensor_parallel_size
        queries, keys = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        if s.num_experts and not self._is_cpu:
            # Those of all experts of a rank.
            f *= s.num_experts // model.megatron.expert_model_parallel_size
        rows = max(2 * f / split, (queries + 2 * keys) / self._tp)
        # On a CPU, the levels and their product with the scales, both in FP32.
        return (8 if self._is_cpu else self._width) * rows * s.hidden_size

    def _input_share(self, product: str) -> float:
        """Share of the layers whose product keeps its input for the gradient of its weight, or of an adapter."""
        if self._adapted:
            return float(any(name in self._adapted for name in PRODUCTS[product]))
        if not self._frozen:
            return 1.0
        names = [w.name for w in layer_weights(self._shape) if w.projection in PRODUCTS[product]]
        frozen = sum(min(self._frozen.get((layer, name), 0.0) for name in names) for layer in self._layers)
        return 1.0 - frozen / max(len(self._layers), 1)

    def _norm_share(self) -> float:
        """Share of the layers' norms whose weight is trained."""
        if self._adapted:
            return 0.0
        names = [w.name for w in layer_weights(self._shape) if w.name.endswith("layernorm.weight")]
        places = [(layer, name) for layer in self._layers for name in names]
        return 1.0 - sum(self._frozen.get(place, 0.0) for place in places) / max(len(places), 1)

    def _shrunk(self) -> float:
        """What adapters keep: A x of each projection."""
        adapted = [w for w in layer_weights(self._shape) if w.projection in self._adapted]
        ranks = sum(
            (self._shape.num_experts_per_tok if weight.is_expert else 1)
            / (self._shared if weight.cut == "columns" or weight.is_expert else 1)
            for weight in adapted
        )
        return self._width * self._spec.model.lora.rank * ranks

    def _residual(self) -> float:
        # The residual stream before attention and before the MLP, and the outputs of both norms, kept by the products.
        # On a CPU both norms keep their normalised input too, for the gradient of their weight.
        parts = 2 + self._input_share("qkv") + self._input_share("gate_up")
        # What attention and MLP add, before it is normed; with norms after them only, in the place of the inputs.
        parts += {
            "before": 0.0,
            "both": 2.0,
            "after": 2.0 - self._input_share("qkv") - self._input_share("gate_up"),
        }[self._shape.norm_place]
        if self._is_cpu:
            parts += 2 * self._norm_share()
        if self._shape.num_experts:
            # Megatron's router keeps the second norm's output in any case.
            parts += 1 - self._input_share("gate_up")
        return parts * self._width * self._shape.hidden_size / self._shared + (0 if self._is_cpu else 8)

    def _attention(self) -> float:
        s, e = self._shape, self._width
        q = e * s.num_attention_heads * s.head_dim / self._tp
        k = e * s.num_key_value_heads * s.head_dim / self._tp
        statistics = 4 * s.num_attention_heads / self._tp
        if self._cp > 1:
            # Keys and values of all ranks' tokens, the outputs of the two chunks, and the combined output.
            return q + 2 * k * self._cp + 2 * q + statistics + (q + 2 * k if self._keeps_qkv() else 0)
        kept = q + 2 * k + q + statistics
        if self._keeps_qkv():
            # The value is a part of the fused QKV, which is kept whole.
            kept += q + k
        if s.qk_norm:
            # The inputs of both norms. On a CPU their normalised outputs too, but the key's input is part of QKV.
            kept += (2 * q + k if self._is_cpu else q + k) + statistics
        if s.attention_gate:
            # The gate, its sigmoid, and the gated output.
            kept += 3 * q
        if s.kv_lora_rank:
            # The latent dimensions before and after their norms, on every rank; keys and values before their parts are joined.
            kept += 2 * e * (s.kv_lora_rank + s.q_lora_rank) / self._shared + k
        if self._is_cpu and self._spec.training.use_rmpad:
            # The outputs of the segments, and their concatenation.
            kept += q
        return kept

    def _delta_net(self) -> float:
        # The output of its first product and the input of its last; the rest is recomputed.
        s = self._shape
        values = s.delta_value_heads * s.delta_value_dim
        projected = s.delta_key_heads * sum(s.delta_rows) if s.delta_layers else 0
        return self._width * (projected + values) / self._tp

    def recurrence(self) -> float:
        """FP32 bytes per token in the backward of a gated delta net."""
        s = self._shape
        keys, values = s.delta_key_heads * s.delta_key_dim, s.delta_value_heads * s.delta_value_dim
        # The taps of the convolution and its sums; queries, keys and values; and in chunks of 64 tokens, for each value head, keys,
        # five matrices of the chunk's tokens, and the state. Counted and fitted: docs/plan.md.
        by_head = 1.5 * s.delta_key_dim + 5 * 64 + s.delta_key_dim * s.delta_value_dim / 64
        return 4 * (9 * (2 * keys + values) + 3 * (keys + values) + s.delta_value_heads * by_head) / self._tp

    def _keeps_qkv(self) -> bool:
        # The kernel that cuts and rotates keeps nothing, but it rotates whole heads of neighbouring halves only.
        is_plain = self._shape.rotary_dim == self._shape.head_dim and not self._shape.rope_interleaved
        return self._is_cpu or self._shape.qk_norm or not is_plain

    def feed_forward(self) -> float:
        """Bytes per token that the MLP or the experts keep until backward, mean of the layers."""
        share = self._shape.expert_layers / self._shape.num_hidden_layers
        # Gate, up and their product; the activated gate too, unless one kernel computes both.
        gated = (3 if self._is_cpu or self._shape.hidden_act != "silu" else 2) + self._input_share("down")
        return share * self._experts(gated) + (1 - share) * gated * self._activated()

    def _experts(self, gated: float) -> float:
        s, e = self._shape, self._width
        shared = gated * e * s.shared_expert_intermediate_size / self._tp
        if not self._is_cpu:
            return shared + experts.kept_bytes(self._spec, s, e, self._input_share("gate_up"))
        split = self._spec.model.megatron.expert_tensor_parallel_size
        # Per expert of a token: the token on both ways, gate, up, silu(gate), their product, the product scaled by the
        # expert's weight twice, and indices.
        f = s.moe_intermediate_size / split
        sent = s.num_experts_per_tok * (e * (2 * s.hidden_size + 6 * f) + 40)
        return shared + sent / self._shared

    def _activated(self) -> float:
        """Input of the down projection."""
        return self._width * self._shape.intermediate_size / self._tp
