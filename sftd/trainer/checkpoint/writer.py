"""A rank's share of a checkpoint on its way to the disk: copied to host memory, then written, hashed and synced by threads.

The threads touch no process group: their owner asks whether they have finished, and informs the other ranks.
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

# Of a write: large enough that the interpreter is rarely needed, small enough that hashing finds it in the cache.
_CHUNK = 4 << 20
_ALIGN = 512
# In the name of a file.
_STATE = "state_"
# Threads, and so files, of a rank: one hashes and writes 1 to 2 GB/s.
_MOST_WRITERS = 8
# Host memory that a copy of this host's shares must leave free.
_SPARE = 0.2


@dataclass(frozen=True)
class FilePlan:
    """One file: what goes into it, in order. The data is a tensor, on any device, or serialized bytes."""

    name: str
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]


def writers() -> int:
    """How many files and threads a rank uses."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WRITERS, usable_cores() // ranks))


def is_state_file(name: str) -> bool:
    """Whether a file holds nothing of the model, but what only a resume needs: optimizer and random streams."""
    return _STATE in name


def plan_files(plan: SavePlan, planner: SavePlanner, prefix: str, files: int) -> list[FilePlan]:
    """Split a rank's share into files of about the same size, without copying anything: `files`, or one more, for the model and
    the state of training share none, so that the state can be deleted alone."""
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
            # What is needed as bytes comes first, as Megatron has it.
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
    """Host memory for a copy of a rank's share, which every save uses again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, files: list[FilePlan]) -> tuple[list[FilePlan], Callable[[], object]]:
        """The same files with their tensors copied, and what to wait for before the copy may be read.

        The tensors may be changed at once: on a GPU what changes them is queued after the copy. Raises
        `MemoryError` where the host has not enough memory to spare.
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
            # Page-locked: the GPU writes into it by itself, at the speed of the bus. Not torch's own page-locked
            # allocator, which rounds up to a power of two.
            code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            if int(code):
                self._memory = torch.empty(0, dtype=torch.uint8)
                raise MemoryError(
                    f"{size} bytes of host memory cannot be page-locked (CUDA error {int(code)})"
                )


def available_memory() -> int:
    """Bytes of memory that this process can still take on this host, or in its container."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        # No cgroup v2 here, or no limit ("max").
        return free
    return min(free, limit - used)


def _tensor_in(memory: memoryview, offset: int, like: Tensor) -> Tensor:
    # A storage of its own: torch.save writes a tensor's whole storage.
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)


class ShareWriter:
    """Threads that write a rank's files. `is_done` and `result` are for the thread that started them."""

    def __init__(self, folder: Path, files: list[FilePlan], ready: Callable[[], object]) -> None:
        self._folder = folder
        self._ready = ready
        self._outcomes: list[tuple[list[WriteResult], FileEntry] | Exception | None] = [None] * len(files)
        self._cancelled = threading.Event()
        # A process that fails elsewhere does not wait for them.
        self._threads = [
            threading.Thread(target=self._run, args=(i, file), name=f"checkpoint-{i}", daemon=True)
            for i, file in enumerate(files)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_done(self) -> bool:
        """Whether every file is down, or failed."""
        return not any(thread.is_alive() for thread in self._threads)

    def result(self) -> tuple[dict[int, list[WriteResult]], list[FileEntry]]:
        """Wait for the files: what Megatron needs to know of each, and what the manifest does. Raises `OSError`."""
        for thread in self._threads:
            thread.join()
        if failed := [outcome for outcome in self._outcomes if isinstance(outcome, Exception)]:
            # The file that failed by itself says why: a full disk is judged otherwise than other errors.
            raise min(failed, key=lambda error: isinstance(error, _FileGivenUp))
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
        except Exception as error:  # noqa: BLE001  handed to the training thread
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
    """On the host, in a storage that holds nothing else."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class _FileGivenUp(OSError):
    """This file was left unfinished because another one failed."""


class _HashingFile(io.RawIOBase):
    """Hashes what it writes to a file. hashlib and the write release the GIL, so training continues meanwhile."""

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
        # BufferedWriter asks for the position.
        if (offset, whence) not in {(0, os.SEEK_CUR), (self._size, os.SEEK_SET)}:
            raise io.UnsupportedOperation("a checkpoint's file is written in one go")
        return self._size

    def write(self, data: Any) -> int:
        if self._cancelled.is_set():
            raise _FileGivenUp("another file of this checkpoint failed")
        piece = memoryview(data).cast("B")[:_CHUNK]
        written = self._file.write(piece) or 0
        self._hash.update(piece[:written])
        self._size += written
        return written

    def sha256(self) -> str:
        return self._hash.hexdigest()
