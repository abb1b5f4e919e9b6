"""Hugging Face safetensors ⇄ Megatron's parameters: one table for both ways.

Loading, a rank reads only the slices that it holds; exporting, the whole parameters of a layer become its tensors.

A new dense family whose tensors have Llama's names is its name in `layout.ARCHITECTURES`, besides what
`wire.model_folder.read_shape` has to conclude from that name (a QKV bias, a QK norm). Each parameter that Llama does
not have is one more `Rule` in `layer_rules`. A family with experts names its tensors in `_EXPERTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.errors import UserError
from sftd.trainer.runtime.session import Layout
from sftd.wire.model.digest import weight_files


@dataclass(frozen=True)
class Join:
    """How tensors of the folder become one parameter, and the way back. `join` takes each tensor, or of each this rank's
    share; `split` takes the whole parameter."""

    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]


def _interleave_groups(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v rows → for each query group its queries, its key and its value, as Megatron's linear_qkv has them."""
    rest = parts[0].shape[1:]
    groups = parts[1].shape[0] // shape.head_dim
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def _separate_groups(whole: Tensor, shape: ModelShape) -> list[Tensor]:
    """The way back of `_interleave_groups`, for all groups."""
    rest, queries = whole.shape[1:], shape.num_attention_heads // shape.num_key_value_heads
    groups = whole.reshape(shape.num_key_value_heads, (queries + 2) * shape.head_dim, *rest)
    sizes = [queries * shape.head_dim, shape.head_dim, shape.head_dim]
    return [part.reshape(-1, *rest) for part in groups.split(sizes, dim=1)]


_ONE = Join(lambda parts, shape: parts[0], lambda whole, shape: [whole])
_STACKED = Join(lambda parts, shape: torch.cat(parts), lambda whole, shape: list(whole.chunk(2)))
_GROUPED = Join(_interleave_groups, _separate_groups)
_Cut = Literal["whole", "rows", "columns", "vocabulary"]


@dataclass(frozen=True)
class Rule:
    """One parameter: `target` is its name in Megatron, `sources` the tensors in the folder that make it.

    `cut` is what tensor-parallel ranks share of each source: nothing, its rows, its columns, or its rows padded to the
    vocabulary that they share evenly.
    """

    target: str
    sources: tuple[str, ...]
    cut: _Cut = "whole"
    how: Join = _ONE

    def below(self, target: str, source: str) -> Rule:
        """The rule with prefixes put before its names."""
        return replace(self, target=target + self.target, sources=tuple(source + s for s in self.sources))


# fmt: off
_LAYER = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule("self_attention.linear_qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "rows", _GROUPED),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
)
_QKV_BIAS = (
    Rule("self_attention.linear_qkv.bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "rows", _GROUPED),
)
_QK_NORM = (
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)
_MLP = (
    Rule("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), "rows", _STACKED),
    Rule("linear_fc2.weight", ("down_proj.weight",), "columns"),
)
_MIXTRAL_EXPERT = (
    Rule("linear_fc1.weight", ("w1.weight", "w3.weight"), "rows", _STACKED),
    Rule("linear_fc2.weight", ("w2.weight",), "columns"),
)
_ROUTER = Rule("mlp.router.weight", ("gate.weight",))
# Architecture → where a layer has its router and experts, and what an expert consists of.
_EXPERTS: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "MixtralForCausalLM": ("block_sparse_moe.", _MIXTRAL_EXPERT),
    "Qwen3MoeForCausalLM": ("mlp.", _MLP),
}
_EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
_FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
_OUTPUT = Rule("output_layer.weight", ("lm_head.weight",), "vocabulary")
# fmt: on


def layer_rules(shape: ModelShape, experts: range) -> list[Rule]:
    """Every parameter of a decoder layer that holds these of the model's experts; if not all, it holds them whole."""
    rules = [*_LAYER]
    if shape.attention_bias:
        rules += _QKV_BIAS
    if shape.qk_norm:
        rules += _QK_NORM
    if not shape.num_experts:
        return rules + [rule.below("mlp.", "mlp.") for rule in _MLP]
    where, expert_rules = _EXPERTS[shape.architecture]
    if len(experts) < shape.num_experts:
        expert_rules = tuple(replace(rule, cut="whole") for rule in expert_rules)
    rules.append(_ROUTER.below("", where))
    for local, number in enumerate(experts):
        names = f"mlp.experts.local_experts.{local}.", f"{where}experts.{number}."
        rules += [rule.below(*names) for rule in expert_rules]
    return rules


def model_rules(
    shape: ModelShape, layers: range, experts: range, *, is_first: bool, output: str | None
) -> Iterator[list[Rule]]:
    """Every parameter of a chunk of the model that holds these layers and experts: embedding, each layer, head.

    `is_first`: it holds the embedding. `output`: "own" if it ends in an output layer with weights of its own, "shared"
    if the output layer takes those of the embedding in the same chunk, None if it is not the last.
    """
    if is_first:
        yield [_EMBEDDING]
    for local, number in enumerate(layers):
        names = f"decoder.layers.{local}.", f"model.layers.{number}."
        yield [rule.below(*names) for rule in layer_rules(shape, experts)]
    if output:
        head = replace(_OUTPUT, sources=_EMBEDDING.sources) if shape.tie_word_embeddings else _OUTPUT
        yield [_FINAL_NORM, head] if output == "own" else [_FINAL_NORM]


@torch.no_grad()
def load(chunks: list[GPTModel], path: str, shape: ModelShape, layout: Layout) -> None:
    """Fill every parameter of this rank's chunks, cast to its dtype.

    Raises `UserError` for weights that are missing, of another shape, or that the model has no place for.
    """
    held = shape.num_experts // layout.ep
    experts = range(layout.ep_rank * held, (layout.ep_rank + 1) * held)
    with ExitStack() as stack:
        folder = Folder(path, stack)
        for chunk in chunks:
            offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage, layout.pp_rank)
            layers = range(offset, offset + len(chunk.decoder.layers))
            _refuse_unknown(folder, shape, layers)
            output = None
            if chunk.post_process:
                # A tied model's last stage holds its own copy of the embedding unless it is also the first.
                output = "shared" if chunk.output_layer.weight is None else "own"
            own = dict(chunk.named_parameters())
            parts = model_rules(shape, layers, experts, is_first=chunk.pre_process, output=output)
            for rule in (rule for part in parts for rule in part):
                parameter = own.pop(rule.target)
                pieces = [
                    _read(folder, source, rule.cut, chunk.vocab_size, shape, layout)
                    for source in rule.sources
                ]
                value = rule.how.join(pieces, shape)
                if parameter.shape != value.shape:
                    raise UserError(
                        f"{path}: {rule.target} is {list(value.shape)}, but config.json asks for {list(parameter.shape)}"
                    )
                parameter.copy_(value)
            assert not own, f"no weight mapping for {sorted(own)}"


def _refuse_unknown(folder: Folder, shape: ModelShape, layers: range) -> None:
    known = {source for rule in layer_rules(shape, range(shape.num_experts)) for source in rule.sources}
    known.add("self_attn.rotary_emb.inv_freq")
    for number in layers:
        prefix = f"model.layers.{number}."
        names = {name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)}
        if unknown := names - known:
            raise UserError(
                f"the model has weights that {shape.architecture} is not trained with here: {prefix}{min(unknown)}"
            )


def _read(
    folder: Folder, name: str, cut: _Cut, padded_vocabulary: int, shape: ModelShape, layout: Layout
) -> Tensor:
    """This rank's share of a tensor."""
    if cut == "vocabulary":
        return _vocabulary_rows(folder, name, padded_vocabulary // layout.tp, shape, layout)
    dim = {"whole": None, "rows": 0, "columns": 1}[cut]
    return folder.read(name, dim, (layout.tp_rank, layout.tp))


def _vocabulary_rows(folder: Folder, name: str, rows: int, shape: ModelShape, layout: Layout) -> Tensor:
    if (found := folder.rows(name)) != shape.vocab_size:
        raise UserError(f"{name} has {found} rows, but config.json's vocab_size is {shape.vocab_size}")
    start = layout.tp_rank * rows
    value = folder.read_rows(name, start, start + rows)
    # Rows that only pad the vocabulary: never looked up, and masked out of the softmax.
    return torch.nn.functional.pad(value, (0, 0, 0, rows - value.shape[0]))


class Folder:
    """The weights of a model folder, one file or shards, opened but not read."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        folder = Path(path)
        self._path = path
        self._files: dict[str, Any] = {}
        for name in weight_files(folder):
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
        """The tensor, or the `part` = (i, n) i-th of n equal shares along `dim`. Raises `UserError` when it is missing or
        has no such shares."""
        if name not in self._files:
            raise UserError(f"the weights in {self._path} lack {name}")
        piece = self._files[name].get_slice(name)
        if dim is None:
            return piece[:]
        shape = piece.get_shape()
        if len(shape) <= dim or shape[dim] % part[1]:
            raise UserError(
                f"{self._path}: {name} is {shape}, which {part[1]} tensor-parallel ranks cannot share"
            )
        size = shape[dim] // part[1]
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
