"""What a layer's experts keep, use and move on a GPU, where they are computed together (`trainer/model/grouped`). Counted from the
tensors, for tokens that are spread evenly over the experts; not measured."""

from __future__ import annotations

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec

# Of a row, its weight and place; of a token and expert, whether it is taken.
_ROW_BYTES, _TAKEN_BYTES = 24, 1


def kept_bytes(spec: Spec, shape: ModelShape, width: int, input_share: float) -> float:
    """Bytes per token until backward: a token's rows (`input_share`: of layers that need them for a gradient), gate and up."""
    rows = _rows(spec, shape)
    own = shape.num_experts_per_tok * _ROW_BYTES + shape.num_experts * _TAKEN_BYTES
    return width * rows * (input_share * shape.hidden_size + 2 * _units(spec, shape)) + own


def spared_bytes(spec: Spec, shape: ModelShape, width: int) -> float:
    """Bytes per token of rows that selective recomputation makes again: those that came from no other rank."""
    m = spec.model.megatron
    is_local = m.expert_model_parallel_size == 1 and m.expert_tensor_parallel_size == 1
    return width * _rows(spec, shape) * shape.hidden_size * is_local


def backward_bytes(spec: Spec, shape: ModelShape, width: int) -> float:
    """Bytes per token of gradients, and of the activation again, while backward runs: before and after the gradient of down."""
    h, f, m = shape.hidden_size, _units(spec, shape), spec.model.megatron
    shared = m.tensor_model_parallel_size if m.sequence_parallel else 1
    return width * (_rows(spec, shape) * max(h + 4 * f, 2 * h + 2 * f) + 2 * h / shared)


def moved_bytes(shape: ModelShape, width: int) -> float:
    """Bytes per token and layer, over all ranks, that are read and written between the products of a step: rows spread and
    collected twice each, gate and up read twice, the activation written twice, and their gradients."""
    h, f = shape.hidden_size, shape.moe_intermediate_size
    return float(width * shape.num_experts_per_tok * (4 * h + 9 * f))


def _rows(spec: Spec, shape: ModelShape) -> float:
    """Rows of a rank's experts for each token of its micro-batch: ranks that split an expert have the same rows."""
    m = spec.model.megatron
    shared = m.tensor_model_parallel_size if m.sequence_parallel else 1
    return shape.num_experts_per_tok * m.expert_tensor_parallel_size / shared


def _units(spec: Spec, shape: ModelShape) -> float:
    return shape.moe_intermediate_size / spec.model.megatron.expert_tensor_parallel_size
