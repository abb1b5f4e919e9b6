"""Read a PEFT folder without torch."""

from __future__ import annotations

import json
from pathlib import Path

from sftd.domain.errors import Problem, Refused
from sftd.domain.model.peft import CONFIG, WEIGHTS, PeftAdapter
from sftd.wire.model.folder import tensors
from sftd.wire.model.text_part import text_name

_WHERE = "model.lora.adapter"


def read(folder: str) -> PeftAdapter:
    """The adapter in a folder, without its values. Raises `Refused` when it cannot be read."""
    path = Path(folder)
    fix = f"give the folder that holds {CONFIG} and {WEIGHTS}"
    if not path.is_dir():
        what = f"{folder} is a file" if path.is_file() else f"no such folder: {folder}"
        raise Refused(Problem(_WHERE, what, fix))
    if (path / "adapter_model.bin").is_file() and not (path / WEIGHTS).is_file():
        fix = "save the adapter as safetensors: save_pretrained(DIR, safe_serialization=True)"
    name = CONFIG
    try:
        config = json.loads((path / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        for key in ("r", "lora_alpha"):
            if not isinstance(config.get(key, 1), int | float):
                raise ValueError(f"{key} is not a number")
        name = WEIGHTS
        return PeftAdapter(
            config, {text_name(name): shape for name, shape in tensors(path / WEIGHTS).items()}
        )
    except FileNotFoundError:
        raise Refused(Problem(_WHERE, f"{folder} holds no {name}", fix)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            Problem(_WHERE, f"{folder}/{name} cannot be read: {error}", "write the adapter again")
        ) from None
