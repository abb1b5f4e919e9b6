"""What a checkpoint's files hold. Tensors and values are read by torch alone: neither by Megatron nor by sftd."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftd.wire.checkpoint import manifest as manifests

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run


def contents(run: Run, step: int) -> dict[str, str]:
    """sha256 of each data file of a whole checkpoint. `.metadata` names its own folder."""
    files = manifests.verify(run.checkpoint(step), None).files
    return {f.name: f.sha256 for f in files if f.name != ".metadata"}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Each tensor by its name, whole: the weights by their names, AdamW's as `optimizer.state.KIND.WEIGHT`."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as read
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder)
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(found, storage_reader=reader)
    return found


def values(folder: Path, prefix: str) -> Any:
    """The only object, not a tensor, whose name begins with `prefix`."""
    with open(folder / ".metadata", "rb") as file:
        places = pickle.load(file).storage_data
    (where,) = (place for index, place in places.items() if index.fqn.startswith(prefix))
    with open(folder / where.relative_path, "rb") as file:
        file.seek(where.offset)
        return torch.load(io.BytesIO(file.read(where.length)), weights_only=False)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)
