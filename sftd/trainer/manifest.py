"""`manifest.json`: what a checkpoint folder holds, written last, checked before anything of it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from sftd.trainer.errors import CheckpointInvalid
from sftd.wire.checkpoint_dir import MANIFEST

NAME = MANIFEST

SCHEMA_VERSION = 1


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the checkpoint; `name` is relative to its folder."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is. `samples` counts those that training has consumed; `loss` and `grad_norm` are the step's,
    as C99 hexadecimal floats (exact, and not finite ones too)."""

    schema_version: int
    run_id: str
    spec_digest: str
    step: int
    tokens_total: int
    samples: int
    loss: str
    grad_norm: str
    layout: dict[str, int]
    dtype: str
    versions: dict[str, str | None]
    files: list[FileEntry]


def encode(manifest: Manifest) -> bytes:
    """As it stands in the file."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def digest(data: bytes) -> str:
    """sha256 (hex) of the file's bytes: names the checkpoint."""
    return hashlib.sha256(data).hexdigest()


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, sorted, without the manifest."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NAME)


def describe(folder: Path, names: Iterable[str]) -> list[FileEntry]:
    """Size and sha256 of files. hashlib lets go of the interpreter, so threads hash in parallel."""

    def one(name: str) -> FileEntry:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(name=name, bytes=os.fstat(file.fileno()).st_size, sha256=sha256)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(one, names))


def read(folder: Path, expected_digest: str | None) -> Manifest:
    """The manifest of a checkpoint folder. Raises `CheckpointInvalid` when it is missing, torn or not the expected one."""
    try:
        data = (folder / NAME).read_bytes()
    except OSError as error:
        raise CheckpointInvalid(f"{NAME} cannot be read: {error.strerror}") from error
    if expected_digest is not None and digest(data) != expected_digest:
        raise CheckpointInvalid(
            f"{NAME} is not the one that was published (sha256 {digest(data)}, not {expected_digest}): {_whose(data)}"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointInvalid(f"{NAME} cannot be read: {error}") from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise CheckpointInvalid(f"{NAME} has schema version {manifest.schema_version}: a newer sftd wrote it")
    return manifest


def _whose(data: bytes) -> str:
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        return f"it is torn or no manifest ({error})"
    return f"it is of step {found.step} of run {found.run_id}, spec {found.spec_digest[:12]}"


def find_damage(folder: Path, entries: Iterable[FileEntry]) -> str | None:
    """What is wrong with the files of a checkpoint, or None when each has its size and sha256. Opens no pickle."""
    try:
        return _find_damage(folder, entries)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"


def _find_damage(folder: Path, entries: Iterable[FileEntry]) -> str | None:
    intact = []
    for entry in entries:
        path = folder / entry.name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return f"{entry.name} is missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{entry.name} has {size} bytes, not {entry.bytes}"
        intact.append(entry)
    for entry, found in zip(intact, describe(folder, [e.name for e in intact]), strict=True):
        if found.sha256 != entry.sha256:
            return f"{entry.name} has sha256 {found.sha256}, not {entry.sha256}"
    return None
