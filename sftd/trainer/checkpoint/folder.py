"""Checks on the ranks that the checkpoint folder is writable."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import torch.distributed as dist

from sftd.domain.run.failures import is_disk_full
from sftd.trainer.errors import CheckpointSaveFailed, UserError
from sftd.trainer.runtime.session import gather
from sftd.wire.attempt.directory import make_durable
from sftd.wire.checkpoint import disk


def check_folder(folder: Path) -> None:
    """Check before the first step that checkpoints can be written. Collective; one rank per node writes.

    Raises `UserError` when the folder is not writable, `CheckpointSaveFailed` when the disk is full.
    """
    is_first = dist.get_rank() == 0
    for is_tested, make in ((is_first, True), (os.environ.get("LOCAL_RANK") == "0", False)):
        reasons = gather(refusal(folder, make=make) if is_tested else None)
        if reason := next((r for r in reasons if r), None):
            if is_disk_full(reason):
                raise CheckpointSaveFailed(reason)
            raise UserError(f"checkpoints cannot be written: {reason}")


def refusal(folder: Path, *, make: bool) -> str | None:
    """Why this process cannot write to the folder; None when it can.

    `make`: create the folder. Otherwise the folder that another node created must be visible here.
    """
    try:
        if make:
            make_durable(folder)
        elif not folder.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "the folder that the first node made is not here", str(folder)
            )
        disk.probe(folder)
    except OSError as error:
        return f"{folder} on {socket.gethostname()}: {error.strerror or error}"
    return None
