"""`manifest.json`: the contents of a checkpoint folder. It is written last and checked before any other file is read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from sftd.domain.errors import CheckpointInvalid
from sftd.wire.checkpoint.directory import MANIFEST, manifest_bytes
from sftd.wire.cores import usable_cores

NAME = MANIFEST
# Schema versions of a whole checkpoint, and of one reduced to its weights. An older sftd must not resume from the latter.
WHOLE, WEIGHTS_ONLY = 1, 2


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the checkpoint; `name` is relative to its folder."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a checkpoint. `samples` is the number of samples that training has consumed. `loss` and `grad_norm` are
    the step's, as C99 hexadecimal floats (exact; may be infinite or NaN). `state_files` are the members of `files` that only a
    resume needs (optimizer and random streams); empty if an older sftd wrote weights and state into the same files. `base` maps
    the weight files of the model folder to their digests (`WeightsDigested`) if frozen weights are not in the checkpoint."""

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
    state_files: list[str] = []
    base: dict[str, str] = {}

    @property
    def weights_only(self) -> bool:
        """Whether the checkpoint was reduced to its weights."""
        return self.schema_version == WEIGHTS_ONLY


def encode(manifest: Manifest) -> bytes:
    """The contents of the file."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def digest(data: bytes) -> str:
    """sha256 (hex) of the file's bytes; it identifies the checkpoint."""
    return hashlib.sha256(data).hexdigest()


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, sorted, without the manifest."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NAME)


def describe(folder: Path, names: Iterable[str]) -> list[FileEntry]:
    """Size and sha256 of files. hashlib releases the GIL, so threads hash in parallel."""

    def one(name: str) -> FileEntry:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(name=name, bytes=os.fstat(file.fileno()).st_size, sha256=sha256)

    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        return list(pool.map(one, names))


def read(folder: Path, expected_digest: str | None) -> Manifest:
    """The manifest of a checkpoint folder. Raises `CheckpointInvalid` when it is missing or torn, or its digest differs."""
    try:
        data = manifest_bytes(folder)
    except OSError as error:
        raise CheckpointInvalid(f"{NAME} cannot be read: {error.strerror}") from error
    if expected_digest is not None and digest(data) != expected_digest:
        raise CheckpointInvalid(
            f"{NAME} is not the one that was published (sha256 {digest(data)}, not {expected_digest}): {_whose(data)}"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointInvalid(f"{NAME} cannot be read: {error}") from error
    if manifest.schema_version not in (WHOLE, WEIGHTS_ONLY):
        raise CheckpointInvalid(f"{NAME} has schema version {manifest.schema_version}: a newer sftd wrote it")
    return manifest


def _whose(data: bytes) -> str:
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        return f"it is torn or not a manifest ({error})"
    return f"it is from step {found.step} of run {found.run_id}, spec {found.spec_digest[:12]}"


def verify(folder: Path, expected_digest: str | None) -> Manifest:
    """The manifest of a checkpoint whose folder has exactly the files of the manifest, each with its size and sha256.
    Opens no pickle. Raises `CheckpointInvalid`.

    `expected_digest` is the sha256 of the manifest, None if unknown.
    """
    manifest = read(folder, expected_digest)
    if damage := find_damage(folder, manifest):
        raise CheckpointInvalid(damage)
    return manifest


def glance(folder: Path, expected_digest: str | None) -> str | None:
    """The first problem of a checkpoint that is visible without reading its files, or None. Only `verify` detects changed
    bytes; call that before using a checkpoint."""
    try:
        return find_strangers(folder, read(folder, expected_digest))
    except CheckpointInvalid as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"


def find_damage(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> str | None:
    """The first problem of a checkpoint's files, or None. Of `parts` processes, each hashes its share, number `part`; every
    process compares the names, kinds and sizes of all files. Opens no pickle."""
    try:
        return find_strangers(folder, manifest) or _find_changed(folder, manifest.files[part::parts])
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"


def find_strangers(folder: Path, manifest: Manifest) -> str | None:
    """The first difference between a checkpoint folder and its manifest by name, kind or size, or None: a missing file, an
    unlisted one (Megatron reads some by name alone), a folder, a link, a device. Reads no file. Raises `OSError`."""
    listed = {entry.name: entry for entry in manifest.files}
    if len(listed) != len(manifest.files) or any(
        "/" in name or name in (NAME, "", ".", "..") for name in listed
    ):
        return f"{NAME} lists a file twice, or one outside the folder"
    there = set()
    with os.scandir(folder) as found:
        for item in found:
            facts = item.stat(follow_symlinks=False)
            if not stat.S_ISREG(facts.st_mode):
                return f"{item.name} is not a regular file"
            if item.name == NAME:
                continue
            if (entry := listed.get(item.name)) is None:
                return f"{item.name} is not in {NAME}"
            if facts.st_size != entry.bytes:
                return f"{item.name} has {facts.st_size} bytes, not {entry.bytes}"
            there.add(item.name)
    missing = next((name for name in listed if name not in there), None)
    return f"{missing} is missing" if missing else None


def _find_changed(folder: Path, entries: list[FileEntry]) -> str | None:
    for entry, found in zip(entries, describe(folder, [e.name for e in entries]), strict=True):
        if found.sha256 != entry.sha256:
            return f"{entry.name} has sha256 {found.sha256}, not {entry.sha256}"
    return None
