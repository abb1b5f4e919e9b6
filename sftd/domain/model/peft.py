"""A PEFT folder, and whether its adapter is the one that a spec describes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from sftd.domain.errors import Problem, quote, several
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import Weight, folder_names, layer_kinds
from sftd.domain.spec.model_section import PROJECTIONS, Lora, Model

# PEFT's default of `r` and `lora_alpha`.
_DEFAULT = 8
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT puts before the model's own names.
PREFIX = "base_model.model."
# Options of PEFT that the trainer does not compute. An empty value turns one off.
_OPTIONS = (
    *("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "arrow_config"),
)
# Ways to begin that change the weights of the model.
_OTHER_BASE = ("pissa", "olora", "loftq", "corda")


class PeftAdapter(msgspec.Struct, frozen=True):
    """A PEFT folder: its adapter_config.json, and name → shape of its tensors."""

    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.config.get("r", _DEFAULT))


def unsupported(adapter: PeftAdapter) -> list[str]:
    """What of an adapter the trainer does not support, whatever the spec."""
    config = adapter.config
    if (kind := config.get("peft_type")) != "LORA":
        return [f"peft_type is {quote(kind)}, not LORA"]
    found = [f"{name} is {quote(config[name])}" for name in _OPTIONS if config.get(name)]
    if (bias := config.get("bias", "none")) != "none":
        found.append(f"bias is {quote(bias)}")
    if str(start := config.get("init_lora_weights")).startswith(_OTHER_BASE):
        found.append(f"init_lora_weights is {quote(start)}, which changes the model's own weights")
    return found if adapter.tensors else [*found, "it has no tensors"]


def tensors_of(shape: ModelShape, rank: int) -> dict[str, tuple[list[str], tuple[int, int]]]:
    """Name in PEFT → (projections, shape) of A and B of every matrix that has projections. The folders of some families have several
    projections as one matrix."""
    weights: dict[str, list[Weight]] = {}
    for kind, _ in layer_kinds(shape):
        for weight in (weight for weight in kind if weight.projection):
            same = weights.setdefault(weight.name, [])
            if weight not in same:
                same.append(weight)
    tensors = {}
    for _, name, full_name, _ in folder_names(shape):
        if parts := weights.get(name):
            stem = f"{PREFIX}{full_name.removesuffix('weight')}lora_"
            projections = [part.projection for part in parts]
            tensors[f"{stem}A.weight"] = (projections, (rank, parts[0].columns))
            tensors[f"{stem}B.weight"] = (projections, (sum(part.rows for part in parts), rank))
    return tensors


def other_settings(adapter: PeftAdapter, lora: Lora, shape: ModelShape) -> dict[str, Any]:
    """The keys of `model.lora` that must change for this adapter, with the values that they need."""
    known = tensors_of(shape, adapter.rank)
    targets = {target for name in adapter.tensors if name in known for target in known[name][0]}
    wanted = {
        "rank": adapter.rank,
        "alpha": float(adapter.config.get("lora_alpha", _DEFAULT)),
        "rslora": bool(adapter.config.get("use_rslora")),
        "targets": [name for name in PROJECTIONS if name in targets],
    }
    now = {name: getattr(lora, name) for name in wanted} | {"targets": list(lora.projections)}
    return {name: value for name, value in wanted.items() if now[name] != value}


def misfit(adapter: PeftAdapter, shape: ModelShape) -> str:
    """What of an adapter does not fit the model: tensors that it does not have, of another size, or in some layers or experts
    only. Empty if it fits."""
    known = tensors_of(shape, adapter.rank)
    if strange := sorted(adapter.tensors.keys() - known.keys()):
        return f"no projection has {several(strange)}"
    for name, found in adapter.tensors.items():
        if found != (needed := known[name][1]):
            return f"{name} is {' × '.join(map(str, found))}, not {' × '.join(map(str, needed))}"
    targets = {tuple(known[name][0]) for name in adapter.tensors}
    missing = [
        name
        for name, (projections, _) in known.items()
        if tuple(projections) in targets and name not in adapter.tensors
    ]
    return f"it lacks {several(missing)}" if missing else ""


def merged_only(model: Model, shape: ModelShape, fix: str) -> Iterator[Problem]:
    """What a PEFT folder cannot describe of a run's adapters: its exports must be merged."""
    if model.override_config:
        what = "a PEFT folder has no config.json, so its users would load the model without these keys"
        yield Problem("model.override_config", what, fix)
    chosen = model.lora.projections
    if shape.num_experts and ("gate" in chosen) != ("up" in chosen):
        # transformers holds both in one parameter.
        yield Problem("model.lora.targets", "peft loads gate and up of experts only together", fix)
