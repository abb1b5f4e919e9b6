"""Adapters (LoRA) as PEFT's files, and as what they add to the weights of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Lora, Model
from sftd.trainer.model import weights
from sftd.trainer.model.adapters import lora as adapters
from sftd.trainer.model.families.rules import Rule

CONFIG = "adapter_config.json"


def write(folder: Path, model: torch.nn.Module, shape: ModelShape, spec: Model) -> int:
    """Write a whole model's adapters as `adapter_model.safetensors` and `adapter_config.json`. Returns the number of elements."""
    own = dict(model.named_parameters())
    parts = weights.model_rules(
        shape, range(shape.num_hidden_layers), range(shape.num_experts), is_first=True, output=None
    )
    rules = list(adapters.rules((rule for part in parts for rule in part), spec.lora))
    tensors = {adapters.PREFIX + rule.sources[0]: own[rule.target].detach().contiguous() for rule in rules}
    save_file(tensors, folder / adapters.ADAPTER_FILES[0], metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.partial_pretrain,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": spec.lora.rslora,
        "target_modules": sorted({rule.sources[0].split(".")[-3] for rule in rules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def changes(rule: Rule, own: dict[str, Any], lora: Lora) -> dict[str, Tensor]:
    """Name of a weight → FP32 `scale · B A`, which its adapter adds to it. Takes the adapters of this rule out of `own`."""
    pairs = list(adapters.rules([rule], lora)) if lora.rank else []
    return {
        a.sources[0].replace("lora_A.", ""): adapters.scale(lora)
        * (own.pop(b.target).detach().float() @ own.pop(a.target).detach().float())
        for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    }
