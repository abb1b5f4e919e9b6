"""A checkpoint without the training state: the same weights beside it, in a folder of their own.

    <checkpoint_dir>/step-00000012/                   whole: weights, optimizer, random streams
    <checkpoint_dir>/step-00000012.weights.partial/   being made
    <checkpoint_dir>/step-00000012.weights/           weights alone; the whole one goes once the log names this one

Files are hard links: nothing is read or copied, and at any moment the folder that the log names is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from sftd.domain.errors import CheckpointInvalid
from sftd.wire.attempt.directory import fsync_dir
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.directory import WEIGHTS, delete_folder


class Reduced(msgspec.Struct, frozen=True):
    """The folder of the weights, its bytes, and its manifest's sha256. `freed` are bytes that only the whole one has."""

    path: str
    bytes: int
    manifest_digest: str
    freed: int


def saving(path: Path, digest: str) -> int:
    """Bytes of a checkpoint that a reduction frees; 0 when it cannot be reduced: it is damaged, not on this host, has no training
    state any more, or an older sftd wrote weights and state into the same files."""
    try:
        manifest = manifests.read(path, digest)
        if manifest.weights_only or manifests.find_strangers(path, manifest):
            return 0
    except (CheckpointInvalid, OSError):
        return 0
    return sum(entry.bytes for entry in manifest.files if entry.name in manifest.state_files)


def reduce(path: Path, digest: str) -> Reduced | None:
    """Make the folder of a checkpoint's weights; it replaces what an interrupted call left. No other process may change the
    checkpoint. None when there is nothing to gain (see `saving`), or when a process reads the folder that was left. Raises `OSError`."""
    freed = saving(path, digest)
    if not freed:
        return None
    manifest = manifests.read(path, digest)
    kept = [entry for entry in manifest.files if entry.name not in manifest.state_files]
    made = msgspec.structs.replace(
        manifest, schema_version=manifests.WEIGHTS_ONLY, files=kept, state_files=[]
    )
    data = manifests.encode(made)
    published = path.with_name(path.name + WEIGHTS)
    partial = published.with_name(published.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if published.exists() and not delete_folder(published):
        return None
    partial.mkdir()
    try:
        for entry in kept:
            os.link(path / entry.name, partial / entry.name)
        with open(partial / manifests.NAME, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(partial)
        partial.rename(published)
        fsync_dir(published.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = len(data) + sum(entry.bytes for entry in kept)
    return Reduced(str(published), size, manifests.digest(data), freed)
