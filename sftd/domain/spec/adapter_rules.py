"""Rules on what of a model is trained: `model.lora`, `model.freeze` and `model.quantize`, from the spec alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from sftd.domain.errors import Problem, quote
from sftd.domain.rules import Rules
from sftd.domain.spec.model_section import ALL_LINEAR, PROJECTIONS, Lora
from sftd.domain.spec.spec import Spec

_RANK = "model.lora.rank"
_TARGETS = "model.lora.targets"


def adapter_keys_without_rank(spec: Spec) -> Iterator[Problem]:
    """Without a rank there are no adapters, and the model's own weights would be trained."""
    lora, default = spec.model.lora, Lora()
    for name in (field.name for field in msgspec.structs.fields(Lora)):
        value = getattr(lora, name)
        if not lora.rank and value != getattr(default, name):
            what = f"{quote(value)} is not used: {_RANK} is 0, which trains the model's own weights"
            rank = "the r of that adapter" if name == "adapter" else "the rank of the adapters, such as 16"
            yield Problem(f"model.lora.{name}", what, f"set {_RANK} to {rank}; or leave this key out")


def unusable_targets(spec: Spec) -> Iterator[Problem]:
    """The targets are either all projections, or a list of names."""
    targets = spec.model.lora.targets
    named = [target for target in targets if target != ALL_LINEAR]
    if not targets:
        fix = f"list some of {', '.join(PROJECTIONS)}; or leave it out for {ALL_LINEAR}"
        yield Problem(_TARGETS, "is empty: nothing would be trained", fix)
    elif ALL_LINEAR in targets and named:
        what = f"has {ALL_LINEAR}, which is every projection, and names beside it: {', '.join(named)}"
        yield Problem(_TARGETS, what, f"keep {ALL_LINEAR}, or the names")
    elif repeated := sorted({target for target in targets if targets.count(target) > 1}):
        yield Problem(_TARGETS, f"names {', '.join(repeated)} more than once", "name each once")


def quantised_without_adapters(spec: Spec) -> Iterator[Problem]:
    """Four bits can be read, but not trained."""
    if spec.model.quantize != "none" and not spec.model.lora.rank:
        what = f"{spec.model.quantize} stores frozen weights, but without adapters all weights are trained"
        yield Problem("model.quantize", what, f"set {_RANK}, such as 16; or leave this key out")


def frozen_under_adapters(spec: Spec) -> Iterator[Problem]:
    """Adapters freeze the whole model."""
    if spec.model.frozen and spec.model.lora.rank:
        what = f"is set, but with {_RANK} {spec.model.lora.rank} only the adapters are trained: all else is frozen"
        fix = f"leave it out; {_TARGETS} decides which projections get an adapter"
        yield Problem("model.freeze" if spec.model.freeze else "model.freeze_router", what, fix)


def unusable_expression(spec: Spec) -> Iterator[Problem]:
    """Names of weights are matched with regular expressions."""
    for pattern in spec.model.freeze:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            fix = r"write one as Python's re has it, such as ^model\.layers\.[0-3]\."
            yield Problem("model.freeze", f"{quote(pattern)} is no regular expression: {error}", fix)


ADAPTERS = Rules(
    refuse=(
        adapter_keys_without_rank,
        unusable_targets,
        quantised_without_adapters,
        frozen_under_adapters,
        unusable_expression,
    )
)
