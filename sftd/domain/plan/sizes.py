"""Sizes that the trainer and the plan share."""

from __future__ import annotations

import math

from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import NF4_BLOCK
from sftd.domain.spec.spec import Spec

# Lengths on a GPU are multiples of this: matrix products get whole tiles, and the allocator sees fewer shapes.
LENGTH_TILE = 64
# Maximum bytes of the logits in memory at a time, and the multiple to which a chunk's rows are rounded.
LOGITS_BYTES = 2 << 30
LOGITS_MULTIPLE = 128
# Maximum bytes of the scores' gradient that deterministic attention holds at a time.
SCORES_BYTES = 2 << 30
# Size in KiB and number of cuBLAS workspaces. Deterministic mode requires CUBLAS_WORKSPACE_CONFIG.
_CUBLAS_KIB, _CUBLAS_COUNT = 4096, 8
CUBLAS_CONFIG = f":{_CUBLAS_KIB}:{_CUBLAS_COUNT}"
CUBLAS_BYTES = _CUBLAS_KIB * 1024 * _CUBLAS_COUNT
# Bytes of a weight, and of a value in NF4: four bits, and an FP32 scale for each block.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 4 / NF4_BLOCK
# Checkpoint bytes per parameter, by dtype of the weights: two moments and the weight in FP32, plus the weight in BF16.
_CHECKPOINT_BYTES = {"float32": 12, "bfloat16": 14}
# The same with `optimizer.precision: lean`: the weight and two moments in BF16.
_LEAN_CHECKPOINT_BYTES = 6
# Free space that a save requires, as a multiple of its expected size.
SAVE_HEADROOM = 1.1


def weights_dtype(spec: Spec, device: str) -> str:
    """Dtype of the weights on a `cpu` or `cuda` device, by its torch name."""
    chosen = spec.model.megatron.params_dtype
    is_bf16 = device == "cuda" or spec.optimizer.precision == "lean"
    return chosen if chosen != "auto" else "bfloat16" if is_bf16 else "float32"


def checkpoint_bytes(spec: Spec, dtype: str) -> int:
    """Bytes per trained parameter of a checkpoint with weights of `dtype`: weight and state of the optimizer."""
    return _LEAN_CHECKPOINT_BYTES if spec.optimizer.precision == "lean" else _CHECKPOINT_BYTES[dtype]


def chunk_layers(spec: Spec, shape: ModelShape) -> int:
    """Layers of a model chunk: of a pipeline stage, or of a virtual stage."""
    m = spec.model.megatron
    pp, vpp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    return shape.num_hidden_layers // (pp * vpp)


def whole_recomputed(spec: Spec, shape: ModelShape) -> float:
    """Share of the layers that are recomputed whole; the others are recomputed selectively, or not at all."""
    model = spec.model
    if not model.enable_gradient_checkpointing or model.recompute != "full":
        return 0.0
    layers = chunk_layers(spec, shape)
    return min(model.recompute_layers or layers, layers) / layers


def length_multiple(spec: Spec, device: str) -> int:
    """The number that divides all micro-batch lengths: context parallelism gives each rank two chunks of a sequence, and
    sequence parallelism splits a rank's part over the tensor-parallel ranks."""
    m = spec.model.megatron
    cp = m.context_parallel_size
    share = math.lcm(2 if cp > 1 else 1, m.tensor_model_parallel_size if m.sequence_parallel else 1)
    return cp * (math.lcm(share, LENGTH_TILE) if device == "cuda" else share)


def logits_chunks(rows: int, row_bytes: int) -> list[slice]:
    """Slices of rows; the loss computes the logits of one slice at a time."""
    most = max(LOGITS_MULTIPLE, LOGITS_BYTES // row_bytes // LOGITS_MULTIPLE * LOGITS_MULTIPLE)
    count = -(-rows // most)
    # Chunks are equal because a small last one would be slow.
    each = -(-rows // max(count, 1) // LOGITS_MULTIPLE) * LOGITS_MULTIPLE
    return [slice(start, min(start + each, rows)) for start in range(0, rows, max(each, 1))]
