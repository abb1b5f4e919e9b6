"""Hugging Face safetensors ⇄ Megatron's parameters, with one table for both directions.

At a load, a rank reads only its own slices. An export converts the whole parameters of one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.errors import UserError
from sftd.trainer.model.families.rules import Cut, Rule
from sftd.trainer.model.families.seam import family_of
from sftd.trainer.model.quantize import mxfp4
from sftd.trainer.model.quantize.products import quantized
from sftd.trainer.runtime.session import Layout
from sftd.wire.model.digest import weight_files
from sftd.wire.model.text_part import text_name

# A matrix of an expert as a family names it.
_OF_EXPERT = re.compile(r"(?P<experts>.*\bexperts\.)(?P<number>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")


def joined_name(name: str) -> str:
    """Name of the tensor that holds a matrix of every expert in some folders, such as those of Qwen3.5: [experts, rows, columns],
    the gate's rows above the up projection's. `name` itself if it is not of an expert."""
    if (found := _OF_EXPERT.fullmatch(name)) is None:
        return name
    return found["experts"] + ("down_proj" if found["matrix"] == "down" else "gate_up_proj")


@dataclass(frozen=True)
class _ExpertSlice:
    """A matrix in a tensor of all experts, read like a tensor's slice."""

    whole: Any
    number: int
    rows: range

    def get_shape(self) -> list[int]:
        return [len(self.rows), self.whole.get_shape()[2]]

    def __getitem__(self, window: Any) -> Any:
        rows, columns = window if isinstance(window, tuple) else (window, slice(None))
        first, last, _ = rows.indices(len(self.rows))
        return self.whole[self.number, self.rows.start + first : self.rows.start + last, columns]


def model_rules(
    shape: ModelShape, layers: range, experts: range, *, is_first: bool, output: str | None
) -> Iterator[list[Rule]]:
    """The rules of a model chunk with these layers and experts, grouped: embedding, each layer, head.

    `is_first`: the chunk holds the embedding. `output`: "own" if the chunk has an output layer with its own weights,
    "shared" if its output layer uses the embedding's weights in the same chunk, None if it is not the last chunk.
    """
    family = family_of(shape)
    if is_first:
        yield [Rule("embedding.word_embeddings.weight", (family.embedding,), "vocabulary")]
    for local, number in enumerate(layers):
        names = f"decoder.layers.{local}.", f"{family.layers}.{number}."
        yield [rule.below(*names) for rule in family.layer_rules(shape, number, experts)]
    if output:
        norm = Rule("decoder.final_layernorm.weight", (family.final_norm,))
        source = family.embedding if shape.tie_word_embeddings else family.output
        head = Rule("output_layer.weight", (source,), "vocabulary")
        yield [norm, head] if output == "own" else [norm]


@torch.no_grad()
def load(chunks: list[GPTModel], path: str, shape: ModelShape, layout: Layout) -> None:
    """Fill every parameter of this rank's chunks, cast to its dtype or quantised.

    Raises `UserError` for weights that are missing, have another shape, or are unknown to the model.
    """
    with ExitStack() as stack:
        folder = Folder(path, stack)
        for chunk in chunks:
            _refuse_unknown(folder, shape, layers_of(chunk, layout))
            own = tensors_of(chunk)
            for rule in chunk_rules(chunk, shape, layout):
                fill(own.pop(rule.target), rule, folder, chunk.vocab_size, shape, layout)
            assert not own, f"no weight mapping for {sorted(own)}"


def tensors_of(chunk: torch.nn.Module) -> dict[str, Any]:
    """The parameters by name, and the routers' biases, which are buffers."""
    return dict(chunk.named_parameters()) | dict(chunk.named_buffers())


def layers_of(chunk: GPTModel, layout: Layout) -> range:
    """Numbers of the layers that a chunk holds."""
    offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage, layout.pp_rank)
    return range(offset, offset + len(chunk.decoder.layers))


def chunk_rules(chunk: GPTModel, shape: ModelShape, layout: Layout) -> list[Rule]:
    """Every parameter of this rank's chunk."""
    held = shape.num_experts // layout.ep
    experts = range(layout.ep_rank * held, (layout.ep_rank + 1) * held)
    output = None
    if chunk.post_process:
        # A tied model's last stage holds its own copy of the embedding unless it is also the first.
        output = "shared" if chunk.output_layer.weight is None else "own"
    parts = model_rules(shape, layers_of(chunk, layout), experts, is_first=chunk.pre_process, output=output)
    return [rule for part in parts for rule in part]


def fill(
    parameter: Tensor, rule: Rule, folder: Folder, padded_vocabulary: int, shape: ModelShape, layout: Layout
) -> None:
    """Read this rank's share of a parameter into it. Raises `UserError`."""
    sources, pieces = rule.sources, []
    if rule.expert is not None:
        pieces = _read_expert(folder, rule, shape)
        sources = ()
    elif rule.parts is not None:
        pieces = list(_read_parts(folder, rule, shape, layout))
        sources = sources[1:]
    pieces += [_read(folder, source, rule.cut, padded_vocabulary, shape, layout) for source in sources]
    value = rule.how.join(pieces, shape)
    if parameter.shape != value.shape:
        raise UserError(
            f"{folder.path}: {rule.target} is {list(value.shape)}, but config.json specifies {list(parameter.shape)}"
        )
    if (stored := quantized(parameter)) is not None:
        # From the folder's dtype: a cast to the parameter's would change which level is nearest.
        stored.fill(value)
    else:
        parameter.copy_(value)


def _refuse_unknown(folder: Folder, shape: ModelShape, layers: range) -> None:
    family = family_of(shape)
    for number in layers:
        rules = family.layer_rules(shape, number, range(shape.num_experts))
        sources = [source for rule in rules for source in rule.sources]
        known = {*family.unread, *sources, *map(joined_name, sources)}
        prefix = f"{family.layers}.{number}."
        names = {name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)}
        if unknown := names - known:
            raise UserError(
                f"the model has weights that {shape.architecture} is not trained with here: {prefix}{min(unknown)}"
            )


def _read(
    folder: Folder, name: str, cut: Cut, padded_vocabulary: int, shape: ModelShape, layout: Layout
) -> Tensor:
    """This rank's share of a tensor."""
    if cut == "vocabulary":
        return _vocabulary_rows(folder, name, padded_vocabulary // layout.tp, shape, layout)
    dim = {"whole": None, "rows": 0, "columns": 1}[cut]
    return folder.read(name, dim, (layout.tp_rank, layout.tp))


def _read_parts(folder: Folder, rule: Rule, shape: ModelShape, layout: Layout) -> Iterator[Tensor]:
    """This rank's share of each of the tensors that the rule's first source joins."""
    assert rule.parts is not None
    name, sizes = rule.sources[0], rule.parts(shape)
    if (found := folder.rows(name)) != sum(sizes):
        raise UserError(f"{folder.path}: {name} has {found} rows, but config.json specifies {sum(sizes)}")
    rank, ranks = (layout.tp_rank, layout.tp) if rule.cut == "rows" else (0, 1)
    for first, size in zip(accumulate((0, *sizes)), sizes, strict=False):
        share = size // ranks
        yield folder.read_rows(name, first + rank * share, first + (rank + 1) * share)


def _read_expert(folder: Folder, rule: Rule, shape: ModelShape) -> list[Tensor]:
    """The tensors of one expert, unsplit."""
    assert rule.expert is not None
    name, number = rule.sources[0], rule.expert.number
    if (found := folder.rows(name)) != shape.num_experts:
        raise UserError(
            f"{folder.path}: {name} holds {found} experts, but config.json specifies {shape.num_experts}"
        )
    return rule.expert.apart(folder.read_rows(name, number, number + 1)[0])


def _vocabulary_rows(folder: Folder, name: str, rows: int, shape: ModelShape, layout: Layout) -> Tensor:
    if (found := folder.rows(name)) != shape.vocab_size:
        raise UserError(f"{name} has {found} rows, but config.json's vocab_size is {shape.vocab_size}")
    start = layout.tp_rank * rows
    value = folder.read_rows(name, start, start + rows)
    # Padding rows are never looked up, and the softmax masks them.
    return torch.nn.functional.pad(value, (0, 0, 0, rows - value.shape[0]))


class Folder:
    """The weights of a folder, by default a model's, in one file or shards. Tensors are read on request. Those of a language model
    inside a vision-language model have the names of one by itself."""

    def __init__(self, path: str, stack: ExitStack, files: Sequence[str] | None = None) -> None:
        folder = Path(path)
        self.path = path
        found: dict[str, tuple[Any, str]] = {}
        for name in weight_files(folder) if files is None else files:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name} cannot be read: {error}") from error
            found |= {text_name(stored): (file, stored) for stored in file.keys()}  # noqa: SIM118
        # Name → files, and names there, of the tensors that it is stored as.
        self._places = {name: [found[part] for part in parts] for name, parts in mxfp4.stored(found).items()}

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def stored_name(self, name: str) -> str:
        """Name of a tensor in its file; its own if it is compressed there, an expert's if it is joined there."""
        if name not in self._places:
            stored, word = self._places[joined_name(name)][0][1], "experts."
            return stored.rpartition(word)[0] + word + name.rpartition(word)[2]
        places = self._places[name]
        return places[0][1] if len(places) == 1 else name

    def read(self, name: str, dim: int | None = None, part: tuple[int, int] = (0, 1)) -> Tensor:
        """The tensor, or share i of n equal shares along `dim` for `part` = (i, n). Raises `UserError` when the tensor is
        missing or cannot be split so."""
        piece = self._pieces(name)[0]
        if dim is None:
            return piece[:]
        shape = piece.get_shape()
        if len(shape) <= dim or shape[dim] % part[1]:
            raise UserError(
                f"{self.path}: {name} is {shape}, which {part[1]} tensor-parallel ranks cannot share"
            )
        size = shape[dim] // part[1]
        window = slice(part[0] * size, (part[0] + 1) * size)
        return piece[window] if dim == 0 else piece[:, window]

    def rows(self, name: str) -> int:
        """First dimension of a tensor. Raises `UserError` when it is missing."""
        return int(self._pieces(name)[0].get_shape()[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, fewer if it ends before `stop`; decompressed if it is stored in MXFP4."""
        parts = [piece[start:stop] for piece in self._pieces(name)]
        return cast(Tensor, parts[0]) if len(parts) == 1 else mxfp4.values(*parts)

    def _pieces(self, name: str) -> list[Any]:
        if name not in self._places:
            return [self._expert_slice(name)]
        return [file.get_slice(stored) for file, stored in self._places[name]]

    def _expert_slice(self, name: str) -> _ExpertSlice:
        found = _OF_EXPERT.fullmatch(name)
        if found is None or (joined := joined_name(name)) not in self._places:
            raise UserError(f"the weights in {self.path} lack {name}")
        (whole,) = self._pieces(joined)
        experts, height, _ = whole.get_shape()
        if (number := int(found["number"])) >= experts:
            raise UserError(f"{self.path}: {joined} holds {experts} experts, but config.json specifies more")
        half = height // 2
        rows = {"gate": range(half), "up": range(half, height), "down": range(height)}[found["matrix"]]
        return _ExpertSlice(whole, number, rows)
