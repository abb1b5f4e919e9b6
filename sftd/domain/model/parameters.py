"""The number of parameters that a rank holds, in any layout (tests/trainer compares it with the trainer's tensors)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import msgspec

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Weight,
    frozen_shares,
    layer_kinds,
    stage_layers,
)
from sftd.domain.spec.model_section import Megatron, Model
from sftd.domain.spec.spec import Spec


class Held(msgspec.Struct, frozen=True):
    """Parameters of one rank. Trained are `experts` of MoE layers (or their adapters), and the `dense` rest, which is sharded
    over other ranks. `frozen` are not trained; `quantized` of them are stored in four bits."""

    dense: int
    experts: int = 0
    frozen: int = 0
    quantized: int = 0

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.dense + self.experts

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trained + self.frozen


def whole_model(shape: ModelShape) -> int:
    """Parameters of the unsharded model, without adapters."""
    return held(Spec(), shape, 0).total


def trained_parameters(model: Model, shape: ModelShape) -> int:
    """Parameters that a run trains, over all ranks: those of its adapters, or the model's without the frozen ones."""
    one_rank = msgspec.structs.replace(model, megatron=Megatron())
    return held(Spec(model=one_rank), shape, 0).trained


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary size rounded up to a multiple of `tensor_parallel`."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def held(spec: Spec, shape: ModelShape, stage: int) -> Held:
    """Parameters of each rank of pipeline stage `stage` (from 0)."""
    return _held(msgspec.json.encode(spec.model), msgspec.json.encode(shape), stage)


# A search asks thousands of times for few layouts. Neither argument of `held` has a hash.
@lru_cache(maxsize=8192)
def _held(encoded_model: bytes, encoded_shape: bytes, stage: int) -> Held:
    model = msgspec.json.decode(encoded_model, type=Model)
    shape, m = msgspec.json.decode(encoded_shape, type=ModelShape), model.megatron
    layers = stage_layers(m, shape.num_hidden_layers, stage)
    chosen, shares = model.lora.projections, frozen_shares(model, shape)
    trained, frozen, quantized = [0, 0], 0, 0

    def count(name: str, size: int, places: list[int], *, is_expert: bool = False) -> int:
        """Count a weight of `size` elements in each of some layers. Returns how many of them are frozen."""
        whole = size * len(places)
        still = whole if chosen else round(size * sum(shares.get((layer, name), 0.0) for layer in places))
        trained[is_expert] += whole - still
        return still

    held_weights = (
        (weight, places)
        for weights, numbers in layer_kinds(shape)
        if (places := [number for number in numbers if number in layers])
        for weight in weights
        if not weight.is_buffer
    )
    for weight, places in held_weights:
        here = shape.num_experts // m.expert_model_parallel_size if weight.is_expert else 1
        share = _share(weight, m)
        size = here * share(weight.rows, "rows") * share(weight.columns, "columns")
        still = count(weight.name, size, places, is_expert=weight.is_expert)
        frozen += still
        if weight.projection and model.quantize != "none":
            quantized += still
        if weight.projection in chosen:
            # A has the rank's columns of the weight, B its rows.
            wide = share(weight.columns, "columns") + share(weight.rows, "rows")
            trained[weight.is_expert] += here * model.lora.rank * wide * len(places)
    added = FAMILIES[shape.architecture].added(shape, m.tensor_model_parallel_size)
    frozen += count("", added, layers)
    for name, size in _outside(m, shape, stage):
        frozen += count(name, size, [-1])
    return Held(trained[0], trained[1], frozen, quantized)


def _share(weight: Weight, m: Megatron) -> Callable[[int, str], int]:
    """The rank's share of a number of rows or columns."""
    split = m.expert_tensor_parallel_size if weight.is_expert else m.tensor_model_parallel_size
    return lambda number, axis: number // split if weight.cut == axis else number


def _outside(m: Megatron, shape: ModelShape, stage: int) -> list[tuple[str, int]]:
    """Name and size of the weights of a rank that are in no layer."""
    tp, last = m.tensor_model_parallel_size, m.pipeline_model_parallel_size - 1
    vocabulary = padded_vocabulary(shape.vocab_size, tp) // tp * shape.hidden_size
    found = [(EMBEDDING, vocabulary)] if stage == 0 else []
    if stage == last:
        found.append((FINAL_NORM, shape.hidden_size))
        # A tied output layer on a stage without the embedding holds a copy of it.
        if not shape.tie_word_embeddings or last:
            found.append((EMBEDDING if shape.tie_word_embeddings else OUTPUT, vocabulary))
    return found
