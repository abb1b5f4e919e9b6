"""Adapters (LoRA) as PEFT's files, and as what they add to the weights of the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sftd.domain.errors import Refused
from sftd.domain.model.peft import CONFIG, PREFIX, WEIGHTS, merged_only
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Lora, Model
from sftd.trainer.model import weights
from sftd.trainer.model.adapters import lora as adapters
from sftd.trainer.model.families.rules import Rule
from sftd.wire.model.text_part import name_in_peft


def check(shape: ModelShape, spec: Model) -> None:
    """Raises `Refused` for adapters that a PEFT folder cannot describe."""
    if problems := list(merged_only(spec, shape, "--merge: export the whole model")):
        raise Refused(problems)


def write(folder: Path, model: torch.nn.Module, shape: ModelShape, spec: Model, *, is_inside: bool) -> int:
    """Write a whole model's adapters as `adapter_model.safetensors` and `adapter_config.json`. Returns the number of elements.

    Experts get PEFT's names from before transformers 5, a module for each expert: peft converts them for the parameter that
    holds all experts, and so they load in either. `is_inside`: the model is that inside a vision-language model.
    """
    own = dict(model.named_parameters())
    parts = weights.model_rules(
        shape, range(shape.num_hidden_layers), range(shape.num_experts), is_first=True, output=None
    )
    tensors: dict[str, Tensor] = {}
    joined: dict[str, int] = {}
    for rule in (rule for part in parts for rule in part):
        found = {a.sources[0]: own[a.target].detach() for a in adapters.rules([rule], spec.lora)}
        if found and rule.parts is not None:
            found, count = _joined(rule, found, shape)
            joined[rule.sources[0].split(".")[-2]] = count
        names = {name: name_in_peft(name) if is_inside else name for name in found}
        tensors |= {PREFIX + names[name]: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    modules: list[str] | str = sorted({name.split(".")[-3] for name in tensors})
    if is_inside:
        # The vision modules have the same names.
        modules = rf".*\.language_model\..*\.({'|'.join(modules)})"
    config = _config(spec, shape, modules) | _patterns(spec.lora, joined)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def _joined(rule: Rule, found: dict[str, Tensor], shape: ModelShape) -> tuple[dict[str, Tensor], int]:
    """One A and one B of the tensor that several projections are in the folder, and the number of those that have adapters: their A
    one below the other, their B as blocks of its rows."""
    assert rule.parts is not None
    name, rows = rule.sources[0].removesuffix("weight"), rule.parts(shape)
    parts = _parts_of(rule, found)
    chosen = [part for part in parts if part is not None]
    blocks = [
        torch.zeros(size, 0) if part is None else part[1] for part, size in zip(parts, rows, strict=True)
    ]
    return {
        f"{name}lora_A.weight": torch.cat([a for a, _ in chosen]),
        f"{name}lora_B.weight": torch.block_diag(*blocks).to(chosen[0][1].dtype),
    }, len(chosen)


def _parts_of(rule: Rule, found: dict[str, Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """(A, B) of each projection in the rule's source, None without an adapter."""
    name = rule.sources[0].removesuffix("weight")
    projections = adapters.FUSED[rule.target.removesuffix(".weight").rpartition(".")[2]]
    pairs = ([found.get(f"{name}{projection}.lora_{x}.weight") for x in "AB"] for projection in projections)
    return [None if a is None or b is None else (a, b) for a, b in pairs]


def _patterns(lora: Lora, joined: dict[str, int]) -> dict[str, Any]:
    """What adapter_config.json says of modules with several projections: module → number of adapted ones."""
    if not joined:
        return {}
    grown = math.sqrt if lora.rslora else float
    return {
        "rank_pattern": {name: lora.rank * count for name, count in joined.items()},
        "alpha_pattern": {name: lora.alpha * grown(count) for name, count in joined.items()},
    }


def _config(spec: Model, shape: ModelShape, modules: list[str] | str) -> dict[str, Any]:
    lora = spec.lora
    alpha, is_rslora = lora.alpha, lora.rslora
    if is_rslora and _has_experts(shape, lora):
        # peft doubles rank and alpha for gate and up of experts, which leaves alpha / rank as it is, but not alpha / √rank.
        alpha, is_rslora = alpha * math.sqrt(lora.rank), False
    path = Path(spec.partial_pretrain)
    cache = path.parent.parent.name
    is_hub = path.parent.name == "snapshots" and cache.startswith("models--")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cache.removeprefix("models--").replace("--", "/") if is_hub else str(path),
        "revision": path.name if is_hub else None,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": is_rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _has_experts(shape: ModelShape, lora: Lora) -> bool:
    return bool(shape.num_experts) and not {"gate", "up", "down"}.isdisjoint(lora.projections)


def changes(rule: Rule, own: dict[str, Any], shape: ModelShape, lora: Lora) -> dict[str, Tensor]:
    """Name of a weight → FP32 `scale · B A`, which its adapter adds to it. Takes the adapters of this rule out of `own`."""
    pairs = adapters.rules([rule], lora) if lora.rank else ()
    found = {part.sources[0]: own.pop(part.target).detach().float() for part in pairs}
    if found and rule.parts is not None:
        found, _ = _joined(rule, found, shape)
    return {
        name.replace("lora_A.", ""): adapters.scale(lora) * (found[name.replace("lora_A", "lora_B")] @ a)
        for name, a in found.items()
        if name.endswith("lora_A.weight")
    }
