"""Rules for adapters, and for a model in four bits, under the shape of the model."""

from __future__ import annotations

from collections.abc import Iterator

from sftd.domain.errors import Problem
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import FEED_FORWARD, NF4_BLOCK, matrices
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec

_ATTENTION = "q, k, v, o"
_TP = "model.megatron.tensor_model_parallel_size"


def rank_above_matrix(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """B A has the rank of its narrow side at most: a larger one only costs memory."""
    lora, sizes = spec.model.lora, matrices(shape)
    if lora.rank and lora.projections:
        narrow = min(lora.projections, key=lambda name: min(sizes[name]))
        rows, columns = sizes[narrow]
        if lora.rank > min(rows, columns):
            what = f"{lora.rank} is more than a side of the {rows} × {columns} matrix of {narrow}"
            yield Problem("model.lora.rank", what, f"set it to {min(rows, columns)} or less")


def dropout_in_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The trainer knows the sample and position of a token, on which dropout depends, only outside of the experts."""
    lora = spec.model.lora
    inside = [name for name in lora.projections if name in FEED_FORWARD]
    if lora.rank and lora.dropout and shape.num_experts and inside:
        what = f"{lora.dropout:g} is not supported for adapters of experts ({', '.join(inside)})"
        fix = f"set it to 0, or list only projections of attention in model.lora.targets: {_ATTENTION}"
        yield Problem("model.lora.dropout", what, fix)


def uneven_blocks(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each rank stores whole blocks of a row."""
    if spec.model.quantize != "nf4":
        return
    m = spec.model.megatron
    ffn = m.expert_tensor_parallel_size if shape.num_experts else m.tensor_model_parallel_size
    # The other projections are cut along their rows.
    cuts = {"o": m.tensor_model_parallel_size, "down": ffn}
    uneven: dict[tuple[int, int], list[str]] = {}
    for name, (_, columns) in matrices(shape).items():
        tp = cuts.get(name, 1)
        if columns % (tp * NF4_BLOCK):
            uneven.setdefault((columns, tp), []).append(name)
    for (columns, tp), names in uneven.items():
        share = f" ÷ {tp} tensor-parallel ranks" if tp > 1 else ""
        what = f"nf4 stores blocks of {NF4_BLOCK} weights of a row, but rows of {', '.join(names)} have {columns}{share}"
        sizes = " or ".join(str(n) for n in range(1, tp) if not columns % (n * NF4_BLOCK))
        fix = f"set {_TP} to {sizes}, or this key to none" if sizes else "set it to none"
        yield Problem("model.quantize", what, fix)


ADAPTERS = Rules(refuse=(rank_above_matrix, dropout_in_experts, uneven_blocks))
