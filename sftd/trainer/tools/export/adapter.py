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


def check(shape: ModelShape, spec: Model) -> None:
    """Raises `Refused` for adapters that a PEFT folder cannot describe."""
    if problems := list(merged_only(spec, shape, "--merge: export the whole model")):
        raise Refused(problems)


def write(folder: Path, model: torch.nn.Module, shape: ModelShape, spec: Model) -> int:
    """Write a whole model's adapters as `adapter_model.safetensors` and `adapter_config.json`. Returns the number of elements.

    Experts get PEFT's names from before transformers 5, a module for each expert: peft converts them for the parameter that
    holds all experts, and so they load in either.
    """
    own = dict(model.named_parameters())
    parts = weights.model_rules(
        shape, range(shape.num_hidden_layers), range(shape.num_experts), is_first=True, output=None
    )
    rules = list(adapters.rules((rule for part in parts for rule in part), spec.lora))
    tensors = {PREFIX + rule.sources[0]: own[rule.target].detach().contiguous() for rule in rules}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    modules = {rule.sources[0].split(".")[-3] for rule in rules}
    (folder / CONFIG).write_text(json.dumps(_config(spec, shape, sorted(modules)), indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def _config(spec: Model, shape: ModelShape, modules: list[str]) -> dict[str, Any]:
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


def changes(rule: Rule, own: dict[str, Any], lora: Lora) -> dict[str, Tensor]:
    """Name of a weight → FP32 `scale · B A`, which its adapter adds to it. Takes the adapters of this rule out of `own`."""
    pairs = list(adapters.rules([rule], lora)) if lora.rank else []
    return {
        a.sources[0].replace("lora_A.", ""): adapters.scale(lora)
        * (own.pop(b.target).detach().float() @ own.pop(a.target).detach().float())
        for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    }
