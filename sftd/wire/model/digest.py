"""Digests of a model folder, their comparison with the log, and a copy that outlives the folder.

A run depends on its model folder as on its data files: submit records the contents, every attempt compares them, and an
export uses the files of the training. Submit must be fast, so it digests samples of the weights; the ranks digest all bytes
while they load them (`sftd.trainer.checkpoint.weights_digest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.log.model_record import ModelRecord
from sftd.domain.model.files import ModelFile, ModelFiles
from sftd.domain.model.rules import changed_files
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt.directory import fsync_dir, make_private

INDEX = "model.safetensors.index.json"
_WHERE = "model.partial_pretrain"
# The files that a run and its export need in addition to the weights.
_KEPT = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *(
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "tekken.json",
        "chat_template*",
        "*.jinja",
        "additional_chat_templates/*.jinja",
    ),
    *("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_PARSED = ("config.json", "generation_config.json")
_PARSED_BYTES = 65536
# The longest header that safetensors writes or reads.
_HEADER_BYTES = 100_000_000
# Samples of a weight file: bytes from the middle of a tensor, and maximum number of tensors.
_SAMPLE_BYTES = 4096
_SAMPLED_TENSORS = 512


def kept_files(folder: Path) -> dict[str, Path]:
    """Name → path of the files that a run and its export need in addition to the weights. Links are followed."""
    found = {path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path for path in sorted(found)}


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a load reads: those in the index, or all. Raises `OSError`, `ValueError` and
    `KeyError` for an index that cannot be read."""
    index = folder / INDEX
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return sorted(path.name for path in folder.glob("*.safetensors"))


def describe(folder: str) -> ModelFiles:
    """The current contents of a model folder, without missing weight files. Raises `Refused` when it cannot be read."""
    path = Path(folder)
    if not path.is_dir():
        raise Refused(Problem(_WHERE, f"no such folder: {folder}", "put the folder back"))
    try:
        found, contents = _read_kept(path)
        files = {name: ModelFile(len(data), _sha256(data)) for name, data in found.items()}
        if (path / INDEX).is_file():
            data = (path / INDEX).read_bytes()
            files[INDEX] = ModelFile(len(data), _sha256(data))
        present = [name for name in weight_files(path) if (path / name).is_file()]
        weights = {name: sampled_digest(path / name) for name in present}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused(Problem(_WHERE, f"{folder} cannot be read: {error}", "put the folder back")) from None
    return ModelFiles(files, weights, contents)


def _read_kept(folder: Path) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    found = {name: path.read_bytes() for name, path in kept_files(folder).items()}
    parsed = {name: _parsed(found[name]) for name in _PARSED if name in found}
    return found, {name: content for name, content in parsed.items() if content is not None}


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The mapping in a small JSON file, or None if the log cannot store it."""
    if len(data) > _PARSED_BYTES:
        return None
    try:
        content = msgspec.json.decode(data, type=dict[str, Any])
        # PostgreSQL's JSON cannot contain NUL. msgspec reads integers that are too large for it to write.
        return None if b"\\u0000" in msgspec.json.encode(content) else content
    except (msgspec.MsgspecError, OverflowError, ValueError, RecursionError):
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sampled_digest(path: Path) -> ModelFile:
    """Size, and sha256 over the size, the safetensors header and samples from the middle of the tensors. It differs between
    two trainings of the same model and does not depend on the file's name. Raises `OSError`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, header = read_header(file, size)
        digest = hashlib.sha256(size.to_bytes(8, "little") + start + header)
        for offset, length in _samples(header):
            digest.update(os.pread(file.fileno(), length, 8 + len(header) + offset))
    return ModelFile(size, digest.hexdigest())


def read_header(file: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """The length field (8 bytes) and the header of a safetensors file of `size` bytes. The header is empty if the length is
    invalid, which must not lead to reading the whole file."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    return start, file.read(length) if length <= min(size, _HEADER_BYTES) else b""


def _samples(header: bytes) -> list[tuple[int, int]]:
    """(offset in the data, length) of the samples; empty if the header cannot be read."""
    try:
        entries = json.loads(header)
        spans = sorted(tuple(e["data_offsets"]) for name, e in entries.items() if name != "__metadata__")
        chosen = spans[:: -(-len(spans) // _SAMPLED_TENSORS)] if spans else []
        return [
            (begin + max(0, end - begin - _SAMPLE_BYTES) // 2, min(end - begin, _SAMPLE_BYTES))
            for begin, end in chosen
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def refuse_changes(record: ModelRecord, spec: Spec, *, weights: bool, fix: str) -> None:
    """Compare the model folder of `spec` with the run's record, if it has one.

    Raises `Refused` when the folder cannot be read or has changed. The last problem has `fix`.
    """
    if record.files is None:
        return
    now = describe(spec.model.partial_pretrain)
    if problems := changed_files(record.files, now, spec, weights=weights, fix=fix):
        raise Refused(problems)


def fork_fix(run_id: str, *, weights: bool) -> str:
    """The fix for a changed model folder. `weights`: the attempt reads its weights, so a checkpoint does not go with other ones."""
    start = " --from-step 0" if weights else ""
    return (
        f"put the folder back as it was, or use it in another run: sftd fork {run_id}{start} --changed-model"
    )


def keep(record: ModelFiles, folder: str, target: Path) -> None:
    """Copy the recorded files of `folder`, without the weights, to `target`, unless it has them. Does nothing if `folder` differs
    from the record, even in a licence. Raises `OSError`."""
    if is_copy(record, target):
        return
    make_private(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, path in kept_files(Path(folder)).items():
            copy = partial / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            with open(copy, "rb") as file:
                os.fsync(file.fileno())
            fsync_dir(copy.parent)
        if not is_copy(record, partial):
            return
        try:
            partial.rename(target)
        except OSError:
            # Another run has just made the same copy, or the existing one is damaged.
            if not is_copy(record, target):
                shutil.rmtree(target)
                partial.rename(target)
        fsync_dir(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_copy(record: ModelFiles, folder: Path) -> bool:
    """Whether `folder` has exactly the recorded files, apart from weights and their index."""
    try:
        found, _ = _read_kept(folder)
    except OSError:
        return False
    wanted = {name: file.sha256 for name, file in record.files.items() if name != INDEX}
    return {name: _sha256(data) for name, data in found.items()} == wanted


def source(record: ModelRecord, spec: Spec, copies: Iterable[Path], *, weights: bool = False) -> str:
    """The folder with config and tokenizer for a checkpoint of the run: a copy made when the run started, else the model
    folder. With `weights` always the model folder, because a copy has none. Raises `Refused` when that is missing or has
    changed."""
    if record.files is None:
        return spec.model.partial_pretrain
    for copy in () if weights else copies:
        if is_copy(record.files, copy):
            return str(copy)
    refuse_changes(record, spec, weights=weights, fix="put the folder back as it was")
    return spec.model.partial_pretrain
