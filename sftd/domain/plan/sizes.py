"""Sizes that the trainer and the plan share."""

from __future__ import annotations

import math

from sftd.domain.model.parameters import trained_parameters
from sftd.domain.model.shape import ModelShape
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
# Bytes of a weight, and of AdamW's state per trained parameter by `optimizer.precision`: two FP32 moments and an FP32 copy of BF16
# weights, or (lean) two BF16 moments alone. A checkpoint holds both.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
OPTIMIZER_BYTES = {
    ("float32", "full"): 8,
    ("bfloat16", "full"): 12,
    ("float32", "lean"): 4,
    ("bfloat16", "lean"): 4,
}
# Bytes of an NF4 value: four bits, and an FP32 scale for each 64 values.
NF4_BYTES = 0.5 + 4 / 64
# Free space that a save requires, as a multiple of its expected size.
SAVE_HEADROOM = 1.1


def weights_dtype(spec: Spec, device: str) -> str:
    """Dtype of the weights on a `cpu` or `cuda` device, by its torch name."""
    chosen = spec.model.megatron.params_dtype
    return chosen if chosen != "auto" else "bfloat16" if device == "cuda" else "float32"


def optimizer_bytes(spec: Spec, dtype: str) -> int:
    """Optimizer bytes of a trained parameter with weights of `dtype`."""
    return OPTIMIZER_BYTES[dtype, spec.optimizer.precision]


def checkpoint_bytes(spec: Spec, shape: ModelShape, dtype: str) -> int:
    """Bytes of a checkpoint: weights and optimizer state of what the run trains. Its few files besides are not counted."""
    return trained_parameters(spec.model, shape) * (WEIGHT_BYTES[dtype] + optimizer_bytes(spec, dtype))


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
