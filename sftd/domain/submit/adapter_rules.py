"""Rules on the folder of an adapter to start from, and on the weights that `model.freeze` names."""

from __future__ import annotations

import json
from collections.abc import Iterator

from sftd.domain.errors import Problem, quote, several
from sftd.domain.model import peft
from sftd.domain.model.weights import folder_names, frozen
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec
from sftd.domain.submit.facts import SubmitFacts

_ADAPTER, _FREEZE = "model.lora.adapter", "model.freeze"
# Modules that the trainer computes in one product, whose weights are one parameter.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def unsupported_adapter(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Only plain LoRA is trained."""
    if facts.adapter and (found := peft.unsupported(facts.adapter)):
        fix = "start from a LoRA adapter without it, or leave this key out"
        yield Problem(_ADAPTER, f"{spec.model.lora.adapter}: {'; '.join(found)}", fix)


def other_adapter_than_spec(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The spec describes the adapter that it starts from."""
    if facts.adapter is None or facts.shape is None or peft.unsupported(facts.adapter):
        return
    lora = spec.model.lora
    if other := peft.other_settings(facts.adapter, lora, facts.shape):
        found = "; ".join(
            f"{name} is {json.dumps(value)}, here {json.dumps(getattr(lora, name))}"
            for name, value in other.items()
        )
        fix = "set " + ", ".join(f"model.lora.{name} to {json.dumps(value)}" for name, value in other.items())
        yield Problem(_ADAPTER, f"{lora.adapter} has other settings than this run: {found}", fix)


def adapter_of_another_model(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The adapter has a pair of matrices for each target in each layer, and in each expert."""
    if facts.adapter is None or facts.shape is None or peft.unsupported(facts.adapter):
        return
    if found := peft.misfit(facts.adapter, facts.shape):
        fix = "give an adapter that was trained on this model, in all of its layers"
        yield Problem(_ADAPTER, f"{spec.model.lora.adapter} does not fit the model: {found}", fix)


def _names(spec: Spec, facts: SubmitFacts) -> list[str]:
    """The names of the model's weights, if any is frozen by name. A tied output layer is the embedding."""
    if not spec.model.freeze or facts.shape is None:
        return []
    return [full_name for _, _, full_name, _ in folder_names(facts.shape)]


def _parts_of_products(chosen: list[str], names: list[str]) -> list[tuple[list[str], list[str]]]:
    """(frozen, trained) weights of each parameter of which only a part is frozen. `chosen` are the frozen ones of `names`."""
    products: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        above, _, kind = name.rpartition(".")
        layer, _, module = above.rpartition(".")
        for fused in _FUSED:
            if module in fused:
                products.setdefault((layer, fused[0], kind), []).append(name)
    is_frozen = set(chosen)
    split = [
        ([name for name in one if name in is_frozen], [name for name in one if name not in is_frozen])
        for one in products.values()
    ]
    return [(inside, outside) for inside, outside in split if inside and outside]


def unmatched_freeze(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A pattern that matches nothing is probably misspelled."""
    names = _names(spec, facts)
    for pattern in spec.model.freeze:
        if names and not frozen([pattern], names):
            fix = f"check it against the names of the model's weights, such as {several(names)}"
            yield Problem(
                _FREEZE, f"{quote(pattern)} matches no weight of {spec.model.partial_pretrain}", fix
            )


def half_frozen_product(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The trainer computes q, k and v in one product, and gate and up: their weights are one parameter."""
    names = _names(spec, facts)
    parts = _parts_of_products(frozen(spec.model.freeze, names), names)
    if parts:
        inside, outside = parts[0]
        more = f"; {len(parts) - 1} more such products" if len(parts) > 1 else ""
        what = f"freezes {', '.join(inside)}, but not {', '.join(outside)}, which are one parameter in training{more}"
        yield Problem(_FREEZE, what, "write patterns that match all of them, or none")


def nothing_left_to_train(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """At least one weight is trained."""
    names = _names(spec, facts)
    if names and len(frozen(spec.model.frozen, names)) == len(names):
        what = f"matches all {len(names)} weights of the model: nothing would be trained"
        yield Problem(_FREEZE, what, "name fewer weights, or train adapters: model.lora.rank")


ADAPTERS = Rules(
    refuse=(
        unsupported_adapter,
        other_adapter_than_spec,
        adapter_of_another_model,
        unmatched_freeze,
        half_frozen_product,
        nothing_left_to_train,
    )
)
