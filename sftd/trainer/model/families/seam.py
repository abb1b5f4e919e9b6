"""The trainer's definition of a model family: its table of weights, and how its layers differ from Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.families.rules import Rule, layer_rules
from sftd.trainer.model.layer import decoder_layer


@dataclass(frozen=True, kw_only=True)
class TrainedFamily:
    """A model family. A relative of Llama that differs only in options of `ModelShape` and in names needs no more than its entry in
    `domain/model/families.py`. Any other has a module in `families`, named for its `model_type`, which defines FAMILY.

    `layer_rules(shape, layer, experts)`: the rules of all parameters of decoder layer `layer` with these experts. Names
    are relative to the layer. `layers`: prefix of the layers in the folder. `unread`: tensors of a layer in the folder
    that are not parameters. `layer_spec(shape, layer)`: Megatron's spec of that layer. `embedding`, `final_norm` and
    `output` are names in the folder.
    """

    layer_rules: Callable[[ModelShape, int, range], list[Rule]] = layer_rules
    layer_spec: Callable[[ModelShape, int], Any] = lambda shape, layer: decoder_layer(shape, layer=layer)
    layers: str = "model.layers"
    unread: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"


def family_of(shape: ModelShape) -> TrainedFamily:
    """The family of a model."""
    name = f"{__package__}.{FAMILIES[shape.architecture].model_type}"
    try:
        return cast(TrainedFamily, import_module(name).FAMILY)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return TrainedFamily()
