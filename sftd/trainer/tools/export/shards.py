"""Weights into safetensors files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> int:
    """Write named tensors as transformers would: `model.safetensors`, or shards and their index where one file would
    hold more than `limit` bytes. One shard is in memory at a time; a larger tensor has one for itself.

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
    """Where a shard stays until it is known how many there are."""
    return folder / f"shard-{number}"
