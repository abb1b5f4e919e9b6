"""Reads a verified checkpoint through Megatron without executing code from it. Unreadable files raise `CheckpointInvalid`."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from sftd.domain.errors import CheckpointInvalid
from sftd.trainer.errors import UserError

_METADATA = ".metadata"
# Modules whose dataclasses and enums may occur in `.metadata`, and other names that may.
_DESCRIPTIONS = frozenset({"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"})
_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
# Makes torch.load accept tensors and plain values only, even when the caller disables that (default_planner.py:391).
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NO_MEMORY = ("out of memory", "can't allocate memory")


class _Description(pickle.Unpickler):
    """Restricts `.metadata`, which torch unpickles without restriction (filesystem.py:938), to classes that describe a
    checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that the pickle names. Raises `pickle.UnpicklingError` if it is not allowed."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module in _DESCRIPTIONS and "." not in name:
            found = super().find_class(module, name)
            is_plain = isinstance(found, type) and (
                dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)
            )
            if is_plain and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not describe a checkpoint")


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load the entries of `state` from the checkpoint in `folder`, whose files match its manifest.

    Raises `CheckpointInvalid` when the files still do not hold the state, `OSError` when the disk fails.
    """
    with invalid_where_it_fails(folder), _weights_only():
        with open(folder / _METADATA, "rb") as file:
            _Description(file).load()
        return dist_checkpointing.load(state, str(folder))


@contextlib.contextmanager
def invalid_where_it_fails(folder: Path) -> Iterator[None]:
    """Convert the errors that a broken checkpoint causes in Megatron or torch to `CheckpointInvalid`."""
    try:
        yield
    except (CheckpointInvalid, UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except CheckpointException as error:
        # torch's collection of the errors of all ranks. It is not an `Exception`.
        first = next((failure[0] for failure in error.failures.values()), error)
        _raise(folder, first)
    except Exception as error:  # noqa: BLE001  a broken pickle may raise anything
        _raise(folder, error)


def _raise(folder: Path, error: BaseException) -> None:
    is_of_disk = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if is_of_disk or any(words in str(error) for words in _NO_MEMORY):
        raise error
    raise CheckpointInvalid(
        f"{folder} cannot be read although its files are those that were published: {type(error).__name__}: {error}"
    ) from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
