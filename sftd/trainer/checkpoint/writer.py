"""Writes a rank's share of a checkpoint: copies it to host memory, then threads write, hash and sync the files.

The threads use no process group. The training thread polls them and informs the other ranks.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from sftd.trainer.checkpoint.state import STATE_KEYS
from sftd.trainer.runtime.megatron_edges.saving import (
    WriterTransforms,
    item_size,
    split_by_size_and_type,
    write_item,
)
from sftd.wire.checkpoint.manifest import FileEntry
from sftd.wire.cores import usable_cores

# Bytes per write: few calls into the interpreter, and the data is still in the cache when it is hashed.
_CHUNK = 4 << 20
_ALIGN = 512
# Part of the name of a state file.
_STATE = "state_"
# Maximum number of threads per rank, each with its file. One hashes and writes 1 to 2 GB/s.
_MAX_WRITERS = 8
# Fraction of the free host memory that the copies must leave.
_SPARE = 0.2


@dataclass(frozen=True)
class FilePlan:
    """A file and its items in order. An item's data is a tensor on any device, or serialized bytes."""

    name: str
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]


def writers() -> int:
    """Number of files and threads per rank."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_WRITERS, usable_cores() // ranks))


def is_state_file(name: str) -> bool:
    """Whether a file holds only what a resume needs: optimizer and random streams."""
    return _STATE in name


def plan_files(plan: SavePlan, planner: SavePlanner, prefix: str, files: int) -> list[FilePlan]:
    """Split a rank's share into files of about the same size, without copying data.

    Model and training state never share a file, so that the state can be deleted alone. There may be one file more than
    `files`.
    """
    state = [item for item in plan.items if item.index.fqn.startswith(STATE_KEYS)]
    model = [item for item in plan.items if not item.index.fqn.startswith(STATE_KEYS)]
    share = sum(map(_tensor_bytes, model)) / max(1, sum(map(_tensor_bytes, plan.items)))
    for_model = max(1, round(files * share))
    return [
        *_files(model, planner, prefix, for_model),
        *_files(state, planner, prefix + _STATE, max(1, files - for_model)),
    ]


def _tensor_bytes(item: WriteItem) -> int:
    return 0 if item.type == WriteItemType.BYTE_IO else item_size(item)


def _files(items: list[WriteItem], planner: SavePlanner, prefix: str, files: int) -> list[FilePlan]:
    buckets = [bucket for bucket in split_by_size_and_type(files, items) if bucket]
    return [
        FilePlan(
            name=f"{prefix}{number}{DEFAULT_SUFFIX}",
            # Serialized bytes come first, as in Megatron.
            items=sorted(
                ((item, _resolve(planner, item)) for item in bucket),
                key=lambda entry: entry[0].type != WriteItemType.BYTE_IO,
            ),
        )
        for number, bucket in enumerate(buckets)
    ]


def _resolve(planner: SavePlanner, item: WriteItem) -> Any:
    data = planner.resolve_data(item)
    return data.detach() if isinstance(data, Tensor) else data


class HostCopy:
    """Host memory for a copy of a rank's share. All saves reuse it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, files: list[FilePlan]) -> tuple[list[FilePlan], Callable[[], object]]:
        """The same files with copied tensors, and a function that waits until the copies are readable.

        The caller may change the tensors at once: on a GPU, later kernels are queued after the copy. Raises
        `MemoryError` when the host has too little free memory.
        """
        sizes = [-(-t.nbytes // _ALIGN) * _ALIGN for f in files for _, t in f.items if isinstance(t, Tensor)]
        self._reserve(sum(sizes))
        view, offset, copies = memoryview(self._memory.numpy()), 0, []
        for file in files:
            items: list[tuple[WriteItem, Tensor | io.BytesIO]] = []
            for item, data in file.items:
                if isinstance(data, Tensor):
                    copy = _tensor_in(view, offset, data)
                    copy.copy_(data, non_blocking=True)
                    offset += -(-data.nbytes // _ALIGN) * _ALIGN
                    items.append((item, copy))
                else:
                    items.append((item, data))
            copies.append(FilePlan(file.name, items))
        if self._device.type != "cuda":
            return copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return copies, copied.synchronize

    def _reserve(self, size: int) -> None:
        if self._memory.numel() >= size:
            return
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if size * ranks > (1 - _SPARE) * (free := available_memory()):
            raise MemoryError(f"{ranks} copies of {size} bytes do not fit into {free} bytes of free memory")
        if self._device.type == "cuda" and self._memory.numel():
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda":
            # Page-locked, so that the GPU copies asynchronously at bus speed. torch's own page-locked allocator would
            # round the size up to a power of two.
            code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            if int(code):
                self._memory = torch.empty(0, dtype=torch.uint8)
                raise MemoryError(
                    f"{size} bytes of host memory cannot be page-locked (CUDA error {int(code)})"
                )


def available_memory() -> int:
    """Bytes of memory that this process can still allocate on this host or in its container."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        # No cgroup v2, or no limit ("max").
        return free
    return min(free, limit - used)


def _tensor_in(memory: memoryview, offset: int, like: Tensor) -> Tensor:
    # Gives each tensor its own storage: torch.save writes the whole storage.
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)


class ShareWriter:
    """Threads that write a rank's files. Only the thread that started them may use `is_done` and `result`."""

    def __init__(self, folder: Path, files: list[FilePlan], ready: Callable[[], object]) -> None:
        self._folder = folder
        self._ready = ready
        self._outcomes: list[tuple[list[WriteResult], FileEntry] | Exception | None] = [None] * len(files)
        self._cancelled = threading.Event()
        # Daemon threads: a failing process exits without waiting for them.
        self._threads = [
            threading.Thread(target=self._run, args=(i, file), name=f"checkpoint-{i}", daemon=True)
            for i, file in enumerate(files)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_done(self) -> bool:
        """Whether every file is written or failed."""
        return not any(thread.is_alive() for thread in self._threads)

    def result(self) -> tuple[dict[int, list[WriteResult]], list[FileEntry]]:
        """Wait for the files. Returns Megatron's write results and the manifest's entries. Raises `OSError`."""
        for thread in self._threads:
            thread.join()
        if failed := [outcome for outcome in self._outcomes if isinstance(outcome, Exception)]:
            # Raise the original error, not a cancellation: callers treat a full disk differently.
            raise min(failed, key=lambda error: isinstance(error, _WriteCancelled))
        results, entries = {}, []
        for i, outcome in enumerate(self._outcomes):
            assert isinstance(outcome, tuple)
            results[i] = outcome[0]
            entries.append(outcome[1])
        return results, entries

    def _run(self, number: int, file: FilePlan) -> None:
        try:
            self._ready()
            self._outcomes[number] = self._write(file)
        except Exception as error:  # noqa: BLE001  passed to the training thread
            self._cancelled.set()
            self._outcomes[number] = error

    def _write(self, file: FilePlan) -> tuple[list[WriteResult], FileEntry]:
        with open(self._folder / file.name, "xb", buffering=0) as raw:
            hashing = _HashingFile(raw, self._cancelled)
            with io.BufferedWriter(hashing, buffer_size=1 << 20) as stream:
                results = [
                    write_item(
                        WriterTransforms(),
                        stream,
                        _alone(data) if isinstance(data, Tensor) else data,
                        item,
                        file.name,
                        serialization_format=SerializationFormat.TORCH_SAVE,
                    )
                    for item, data in file.items
                ]
                stream.flush()
                os.fsync(raw.fileno())
                if (size := os.fstat(raw.fileno()).st_size) != hashing.tell():
                    raise OSError(f"{file.name} has {size} bytes on the disk, not {hashing.tell()}")
                entry = FileEntry(name=file.name, bytes=hashing.tell(), sha256=hashing.sha256())
        return results, entry


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the host, in its own storage."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class _WriteCancelled(OSError):
    """This file is incomplete because another file failed."""


class _HashingFile(io.RawIOBase):
    """Writes to a file and hashes the bytes. Both release the GIL, so training continues meanwhile."""

    def __init__(self, file: io.RawIOBase, cancelled: threading.Event) -> None:
        self._file = file
        self._cancelled = cancelled
        self._hash = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # BufferedWriter queries the position.
        if (offset, whence) not in {(0, os.SEEK_CUR), (self._size, os.SEEK_SET)}:
            raise io.UnsupportedOperation("a checkpoint file is written sequentially")
        return self._size

    def write(self, data: Any) -> int:
        if self._cancelled.is_set():
            raise _WriteCancelled("another file of this checkpoint failed")
        piece = memoryview(data).cast("B")[:_CHUNK]
        written = self._file.write(piece) or 0
        self._hash.update(piece[:written])
        self._size += written
        return written

    def sha256(self) -> str:
        return self._hash.hexdigest()
