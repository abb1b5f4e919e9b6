"""Hugging Face safetensors → this rank's Megatron parameters, reading only what the rank holds.

One table serves Llama, Mistral, Qwen2 (QKV bias) and Qwen3 (QK norm), tied and untied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftd.domain.layout import ModelShape
from sftd.trainer.errors import UserError
from sftd.trainer.session import Layout


class Folder:
    """The weights of a model folder, one file or shards, opened but not read."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        folder = Path(path)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(f.name for f in folder.glob("*.safetensors"))
        self._path = path
        self._files: dict[str, Any] = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name} cannot be read: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def read(self, name: str, dim: int | None = None, part: tuple[int, int] = (0, 1)) -> Tensor:
        """The tensor, or the `part` = (i, n) i-th of n equal shares along `dim`. Raises `UserError` when it is missing."""
        if name not in self._files:
            raise UserError(f"the weights in {self._path} lack {name}")
        piece = self._files[name].get_slice(name)
        if dim is None:
            return piece[:]
        size = piece.get_shape()[dim] // part[1]
        window = slice(part[0] * size, (part[0] + 1) * size)
        return piece[window] if dim == 0 else piece[:, window]

    def rows(self, name: str) -> int:
        """First dimension of a tensor. Raises `UserError` when it is missing."""
        if name not in self._files:
            raise UserError(f"the weights in {self._path} lack {name}")
        return int(self._files[name].get_slice(name).get_shape()[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix, without those behind its last."""
        return self._files[name].get_slice(name)[start:stop]


@dataclass(frozen=True)
class Rule:
    """How one parameter of a layer is made: `sources` are each cut in TP equal shares along `dim` (None: whole) and
    put together by `join`."""

    target: str
    sources: tuple[str, ...]
    dim: int | None
    join: Callable[[list[Tensor], ModelShape], Tensor] = lambda parts, shape: parts[0]


def _stack(parts: list[Tensor], shape: ModelShape) -> Tensor:
    return torch.cat(parts)


def _interleave_groups(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v rows → for each query group its queries, its key and its value, as Megatron's linear_qkv has them."""
    rest = parts[0].shape[1:]
    groups = parts[1].shape[0] // shape.head_dim
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def layer_rules(shape: ModelShape) -> list[Rule]:
    """The table: every parameter of a decoder layer."""
    qkv = tuple(f"self_attn.{x}_proj" for x in "qkv")
    rules = [
        Rule("input_layernorm.weight", ("input_layernorm.weight",), None),
        Rule("self_attention.linear_qkv.weight", tuple(f"{x}.weight" for x in qkv), 0, _interleave_groups),
        Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), 1),
        Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), None),
        Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0, _stack),
        Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), 1),
    ]
    if shape.attention_bias:
        rules.append(
            Rule("self_attention.linear_qkv.bias", tuple(f"{x}.bias" for x in qkv), 0, _interleave_groups)
        )
    if shape.qk_norm:
        rules += [
            Rule(f"self_attention.{x}_layernorm.weight", (f"self_attn.{x}_norm.weight",), None) for x in "qk"
        ]
    return rules


@torch.no_grad()
def load(chunks: list[GPTModel], path: str, shape: ModelShape, layout: Layout) -> None:
    """Fill every parameter of this rank's chunks, cast to its dtype.

    Raises `UserError` for weights that are missing, of another shape, or that the model has no place for.
    """
    with ExitStack() as stack:
        folder = Folder(path, stack)
        for chunk in chunks:
            own = dict(chunk.named_parameters())
            for name, value in _chunk_values(chunk, folder, shape, layout):
                parameter = own.pop(name)
                if parameter.shape != value.shape:
                    raise UserError(
                        f"{path}: {name} is {list(value.shape)}, but config.json asks for {list(parameter.shape)}"
                    )
                parameter.copy_(value)
            assert not own, f"no weight mapping for {sorted(own)}"


def _chunk_values(
    chunk: GPTModel, folder: Folder, shape: ModelShape, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    part = (layout.tp_rank, layout.tp)
    rules = layer_rules(shape)
    known = {source for rule in rules for source in rule.sources}
    offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage, layout.pp_rank)
    for local in range(len(chunk.decoder.layers)):
        prefix = f"model.layers.{offset + local}."
        unknown = (
            {n.removeprefix(prefix) for n in folder.names if n.startswith(prefix)}
            - known
            - {"self_attn.rotary_emb.inv_freq"}
        )
        if unknown:
            raise UserError(
                f"the model has weights that {shape.architecture} is not trained with here: {prefix}{min(unknown)}"
            )
        for rule in rules:
            pieces = [folder.read(prefix + source, rule.dim, part) for source in rule.sources]
            yield f"decoder.layers.{local}.{rule.target}", rule.join(pieces, shape)
    embedding = "model.embed_tokens.weight"
    if chunk.pre_process:
        yield "embedding.word_embeddings.weight", _vocabulary_rows(folder, embedding, chunk, shape, layout)
    if chunk.post_process:
        yield "decoder.final_layernorm.weight", folder.read("model.norm.weight")
        # A tied model's last stage holds its own copy of the embedding unless it is also the first.
        if chunk.output_layer.weight is not None:
            name = embedding if shape.tie_word_embeddings else "lm_head.weight"
            yield "output_layer.weight", _vocabulary_rows(folder, name, chunk, shape, layout)


def _vocabulary_rows(folder: Folder, name: str, chunk: GPTModel, shape: ModelShape, layout: Layout) -> Tensor:
    if (found := folder.rows(name)) != shape.vocab_size:
        raise UserError(f"{name} has {found} rows, but config.json's vocab_size is {shape.vocab_size}")
    rows = chunk.vocab_size // layout.tp
    start = layout.tp_rank * rows
    value = folder.read_rows(name, start, start + rows)
    # Rows that only pad the vocabulary: never looked up, and masked out of the softmax.
    return torch.nn.functional.pad(value, (0, 0, 0, rows - value.shape[0]))
