"""Rules for adapters, and for a model in four bits, under the shape of the model."""

from __future__ import annotations

from collections.abc import Iterator

from sftd.domain.errors import Problem
from sftd.domain.model.parameters import held
from sftd.domain.model.peft import merged_only
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import NF4_BLOCK, frozen_shares, layer_kinds, layer_weights
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec

_ATTENTION = "q, k, v, o"
_TP = "model.megatron.tensor_model_parallel_size"


def rank_above_matrix(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """B A has the rank of its narrow side at most: a larger one only costs memory."""
    lora = spec.model.lora
    weights = (weight for weights, _ in layer_kinds(shape) for weight in weights)
    if adapted := [weight for weight in weights if weight.projection in lora.projections]:
        narrow = min(adapted, key=lambda weight: min(weight.rows, weight.columns))
        most = min(narrow.rows, narrow.columns)
        if lora.rank > most:
            what = f"{lora.rank} is more than a side of the {narrow.rows} × {narrow.columns} matrix of {narrow.projection}"
            yield Problem("model.lora.rank", what, f"set it to {most} or less")


def dropout_in_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The trainer knows the sample and position of a token, on which dropout depends, only outside of the experts."""
    lora = spec.model.lora
    weights = layer_weights(shape) if lora.dropout and shape.num_experts else []
    if inside := [w.projection for w in weights if w.is_expert and w.projection in lora.projections]:
        what = f"{lora.dropout:g} is not supported for adapters of experts ({', '.join(inside)})"
        fix = f"set it to 0, or list only projections of attention in model.lora.targets: {_ATTENTION}"
        yield Problem("model.lora.dropout", what, fix)


def adapters_of_joined_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Neither adapters nor four bits are supported for experts that one tensor of the folder holds."""
    joined = [weight for weight in layer_weights(shape) if weight.is_joined and weight.projection]
    lora = spec.model.lora
    if inside := [weight.projection for weight in joined if weight.projection in lora.projections]:
        what = f"adapters of the experts of {shape.architecture} ({', '.join(inside)}) are not supported"
        yield Problem("model.lora.targets", what, f"list only projections of attention: {_ATTENTION}")
    if joined and spec.model.quantize != "none":
        what = f"{spec.model.quantize} is not supported for {shape.architecture}"
        yield Problem("model.quantize", what, "set it to none")


def uneven_blocks(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each rank stores whole blocks of a row."""
    if spec.model.quantize != "nf4":
        return
    m = spec.model.megatron
    uneven: dict[tuple[int, int], list[str]] = {}
    every = (weight for weights, _ in layer_kinds(shape) for weight in weights if weight.projection)
    for weight in dict.fromkeys(every):
        split = m.expert_tensor_parallel_size if weight.is_expert else m.tensor_model_parallel_size
        tp = split if weight.cut == "columns" else 1
        if weight.columns % (tp * NF4_BLOCK):
            uneven.setdefault((weight.columns, tp), []).append(weight.projection)
    for (columns, tp), names in uneven.items():
        share = f" ÷ {tp} tensor-parallel ranks" if tp > 1 else ""
        what = f"nf4 stores blocks of {NF4_BLOCK} weights of a row, but rows of {', '.join(names)} have {columns}{share}"
        sizes = " or ".join(str(n) for n in range(1, tp) if not columns % (n * NF4_BLOCK))
        fix = f"set {_TP} to {sizes}, or this key to none" if sizes else "set it to none"
        yield Problem("model.quantize", what, fix)


def exported_merged_only(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Most people export adapters as a PEFT folder."""
    if spec.model.lora.rank:
        fix = "the run can train; export its model whole: `sftd export RUN DIR --merge`"
        yield from merged_only(spec.model, shape, fix)


def some_experts_frozen(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """A checkpoint holds a matrix of all experts of a layer as one tensor."""
    shares = frozen_shares(spec.model, shape)
    # The shares of all experts add up to almost 1.
    if split := sorted(layer for (layer, _), share in shares.items() if share < 0.999):
        what = f"freezes some of the experts of layer {split[0]}, but not all"
        yield Problem("model.freeze", what, "match the weights of all experts of a layer, or of none")


def stage_without_training(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each pipeline stage has an optimizer."""
    stages = spec.model.megatron.pipeline_model_parallel_size
    for stage in range(stages if spec.model.frozen and shape.num_hidden_layers % stages == 0 else 0):
        if not held(spec, shape, stage).trained:
            what = f"freezes all weights of pipeline stage {stage} of {stages}"
            yield Problem("model.freeze", what, "use fewer stages, or freeze fewer layers")


ADAPTERS = Rules(
    refuse=(
        rank_above_matrix,
        dropout_in_experts,
        adapters_of_joined_experts,
        uneven_blocks,
        some_experts_frozen,
        stage_without_training,
    ),
    warn=(exported_merged_only,),
)
