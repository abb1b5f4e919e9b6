"""Sizes that the trainer uses and a plan must know: both take them from here."""

from __future__ import annotations

import math

from sftd.domain.spec.spec import Spec

# Lengths on a GPU are rounded up to it: whole tiles for the matrix products, and fewer shapes to allocate memory for.
LENGTH_TILE = 64
# Bytes of the logits that the loss holds at a time, and what the rows of a chunk are a multiple of.
LOGITS_BYTES = 2 << 30
LOGITS_MULTIPLE = 128
# Bytes of the scores' gradient that deterministic attention holds at a time.
SCORES_BYTES = 2 << 30
# cuBLAS's workspace: how many KiB, how many times. In deterministic mode it must be set (CUBLAS_WORKSPACE_CONFIG).
_CUBLAS_KIB, _CUBLAS_COUNT = 4096, 8
CUBLAS_CONFIG = f":{_CUBLAS_KIB}:{_CUBLAS_COUNT}"
CUBLAS_BYTES = _CUBLAS_KIB * 1024 * _CUBLAS_COUNT
# Bytes of a checkpoint per parameter, by dtype of the weights: two FP32 moments and the weight in FP32, and also in BF16.
CHECKPOINT_BYTES = {"float32": 12, "bfloat16": 14}
# Free space that a save asks for, as a share of its expected size.
SAVE_HEADROOM = 1.1


def weights_dtype(spec: Spec, device: str) -> str:
    """Dtype of the weights on a `cpu` or `cuda` device, as torch names it."""
    chosen = spec.model.megatron.params_dtype
    return chosen if chosen != "auto" else "bfloat16" if device == "cuda" else "float32"


def length_multiple(spec: Spec, device: str) -> int:
    """What the lengths of micro-batches are multiples of: context parallelism gives a rank two chunks of a sequence,
    sequence parallelism each tensor-parallel rank its part of those."""
    m = spec.model.megatron
    cp = m.context_parallel_size
    share = math.lcm(2 if cp > 1 else 1, m.tensor_model_parallel_size if m.sequence_parallel else 1)
    return cp * (math.lcm(share, LENGTH_TILE) if device == "cuda" else share)


def logits_chunks(rows: int, row_bytes: int) -> list[slice]:
    """The rows whose logits the loss holds at a time."""
    most = max(LOGITS_MULTIPLE, LOGITS_BYTES // row_bytes // LOGITS_MULTIPLE * LOGITS_MULTIPLE)
    count = -(-rows // most)
    # Equal chunks: a small last one would run at a fraction of the speed.
    each = -(-rows // max(count, 1) // LOGITS_MULTIPLE) * LOGITS_MULTIPLE
    return [slice(start, min(start + each, rows)) for start in range(0, rows, max(each, 1))]
