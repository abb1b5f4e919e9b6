"""A temporary folder that one rank of each host fills and all ranks of the host map."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from sftd.trainer.errors import DataError, DataNotDecoded
from sftd.trainer.runtime.session import gather

_BUSY = "busy"
_POLL_SECONDS = 0.05


@contextmanager
def shared_folder(parent: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder in `parent`, filled by `fill(folder)` on one rank of each host. Called by every rank.

    Each rank maps the files in the block. The folder is removed afterwards; mapped files stay readable. Raises
    `DataError` or `DataNotDecoded` on every rank when `fill` raises it on one.
    """
    first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    is_writer = dist.get_rank() == first
    folder = gather(_make(parent) if is_writer else None)[first]
    try:
        found: Exception | None = None
        if is_writer:
            try:
                fill(folder)
            except (DataError, DataNotDecoded) as error:
                found = error
            # The signal removes a file instead of creating one, so it works on a full disk.
            (folder / _BUSY).unlink()
        # Poll instead of waiting in a collective: NCCL would time out while the writer decodes.
        while (folder / _BUSY).exists():
            time.sleep(_POLL_SECONDS)
        if errors := [error for error in gather(found) if error]:
            raise errors[0]
        yield folder
        dist.barrier()
    finally:
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)


def _make(parent: Path) -> Path:
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=parent))
    (folder / _BUSY).touch()
    return folder
