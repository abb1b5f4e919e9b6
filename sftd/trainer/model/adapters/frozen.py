"""Weights that a run does not train: `model.freeze`."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import frozen
from sftd.domain.spec.model_section import Model
from sftd.trainer.errors import UserError
from sftd.trainer.model import weights
from sftd.trainer.runtime.session import Layout


def freeze(chunks: list[GPTModel], model: Model, shape: ModelShape, layout: Layout) -> None:
    """Turn the gradients of the weights off whose names in the model folder match one of `model.freeze`. Raises `UserError` where
    Megatron computes weights that match together with weights that do not."""
    for chunk in chunks if model.frozen else ():
        own = weights.tensors_of(chunk)
        for rule in weights.chunk_rules(chunk, shape, layout):
            matching = frozen(model.frozen, rule.sources)
            if matching and len(matching) < len(rule.sources):
                rest = ", ".join(name for name in rule.sources if name not in matching)
                raise UserError(
                    f"model.freeze matches {', '.join(matching)}, but not {rest}, which is computed in the same product: fix: match "
                    "all of them or none"
                )
            if matching:
                own[rule.target].requires_grad_(False)
