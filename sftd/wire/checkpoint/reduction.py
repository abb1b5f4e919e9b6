"""Reduce a checkpoint to its weights, in a separate folder beside it.

    <checkpoint_dir>/step-00000012/                   whole: weights, optimizer, random streams
    <checkpoint_dir>/step-00000012.weights.partial/   in progress
    <checkpoint_dir>/step-00000012.weights/           weights only; the whole one is deleted after the log names this one

The files are hard links, so no data is copied, and the folder that the log names is complete at any time.
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
    """The folder of the weights, its size in bytes, and its manifest's sha256. `freed`: bytes that deleting the whole checkpoint
    frees."""

    path: str
    bytes: int
    manifest_digest: str
    freed: int


def saving(path: Path, digest: str) -> int:
    """Bytes that a reduction of a checkpoint frees. 0 when it cannot be reduced: it is damaged, not on this host, already
    reduced, or an older sftd wrote weights and state into the same files."""
    try:
        manifest = manifests.read(path, digest)
        if manifest.weights_only or manifests.find_strangers(path, manifest):
            return 0
    except (CheckpointInvalid, OSError):
        return 0
    return sum(entry.bytes for entry in manifest.files if entry.name in manifest.state_files)


def reduce(path: Path, digest: str) -> Reduced | None:
    """Make the folder of a checkpoint's weights. Replaces the folder of an interrupted call. No other process may change the
    checkpoint. Returns None when a reduction frees nothing (see `saving`), or when a process reads the folder to replace.
    Raises `OSError`."""
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
