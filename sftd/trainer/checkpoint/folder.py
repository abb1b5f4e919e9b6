"""Whether the folder of a run's checkpoints can be written to, asked by the ranks themselves."""

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
    """Find out before the first step whether checkpoints can be written. Called by every rank; one of each node writes.

    Raises `UserError` when they cannot, and `CheckpointSaveFailed` when the disk is full.
    """
    is_first = dist.get_rank() == 0
    for asked, make in ((is_first, True), (os.environ.get("LOCAL_RANK") == "0", False)):
        reasons = gather(refusal(folder, make=make) if asked else None)
        if reason := next((r for r in reasons if r), None):
            if is_disk_full(reason):
                raise CheckpointSaveFailed(reason)
            raise UserError(f"checkpoints cannot be written: {reason}")


def refusal(folder: Path, *, make: bool) -> str | None:
    """Why this process cannot write to the folder, None when it can. `make`: the folder may be missing; without it, one
    that another node has made must be seen here."""
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
