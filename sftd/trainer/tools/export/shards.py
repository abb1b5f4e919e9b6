"""Writes weights to the safetensors files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> int:
    """Write named tensors as transformers does: `model.safetensors`, or shards and an index if one file would hold more
    than `limit` bytes. One shard is in memory at a time. A tensor above the limit gets its own shard.

    Returns the number of elements of all tensors.
    """
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    parameters = written = 0

    def flush() -> None:
        nonlocal written
        save_file(shard, _numbered(folder, len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        written += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > limit:
            flush()
        shard[name] = tensor
        parameters += tensor.numel()
    flush()
    if len(shards) == 1:
        _numbered(folder, 0).rename(folder / "model.safetensors")
        return parameters
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _numbered(folder, number).rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_parameters": parameters, "total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return parameters


def _numbered(folder: Path, number: int) -> Path:
    """Temporary path of a shard until the number of shards is known."""
    return folder / f"shard-{number}"
