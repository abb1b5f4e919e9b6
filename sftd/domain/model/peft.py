"""A PEFT folder, and whether its adapter is the one that a spec describes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgspec

from sftd.domain.errors import quote, several
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import FEED_FORWARD, matrices
from sftd.domain.spec.model_section import PROJECTIONS, Lora

# PEFT's default of `r` and `lora_alpha`.
_DEFAULT = 8
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A module of the model folder → its projection. Mixtral numbers the matrices of an expert.
MODULES = {f"{name}_proj": name for name in PROJECTIONS} | {"w1": "gate", "w3": "up", "w2": "down"}
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:.*\.)?(\w+)\.lora_([AB])\.weight")
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
    if other := sorted(name for name in adapter.tensors if _place(name) is None):
        found.append(f"it has tensors of no projection: {several(other)}")
    return found if adapter.tensors else [*found, "it has no tensors"]


def _place(name: str) -> tuple[int, str, str] | None:
    """(layer, projection, A or B) of a tensor, None if it belongs to no projection."""
    part = _TENSOR.fullmatch(name)
    return (int(part[1]), MODULES[part[2]], part[3]) if part and part[2] in MODULES else None


def _places(adapter: PeftAdapter) -> dict[str, tuple[int, str, str]]:
    places = ((name, _place(name)) for name in sorted(adapter.tensors))
    return {name: place for name, place in places if place is not None}


def other_settings(adapter: PeftAdapter, lora: Lora) -> dict[str, Any]:
    """The keys of `model.lora` that must change for this adapter, with the values that they need."""
    targets = {projection for _, projection, _ in _places(adapter).values()}
    wanted = {
        "rank": adapter.rank,
        "alpha": float(adapter.config.get("lora_alpha", _DEFAULT)),
        "rslora": bool(adapter.config.get("use_rslora")),
        "targets": [name for name in PROJECTIONS if name in targets],
    }
    now = {name: getattr(lora, name) for name in wanted} | {"targets": list(lora.projections)}
    return {name: value for name, value in wanted.items() if now[name] != value}


def misfits(adapter: PeftAdapter, shape: ModelShape) -> list[str]:
    """What of an adapter does not fit the model: a matrix of another size or layer, and layers or experts without one."""
    sizes, layers = matrices(shape), shape.num_hidden_layers
    count: Counter[str] = Counter()
    for name, (layer, projection, which) in _places(adapter).items():
        rows, columns = sizes[projection]
        found, needed = (
            adapter.tensors[name],
            (adapter.rank, columns) if which == "A" else (rows, adapter.rank),
        )
        if layer >= layers:
            return [f"it has {name}, but the model {layers} layers"]
        if found != needed:
            return [f"{name} is {' × '.join(map(str, found))}, not {' × '.join(map(str, needed))}"]
        count[projection] += 1
    experts = max(1, shape.num_experts)
    needs = {name: 2 * layers * (experts if name in FEED_FORWARD else 1) for name in count}
    return [
        f"it has {count[name]} matrices of {name}, for {need} in the model"
        for name, need in needs.items()
        if count[name] != need
    ]
