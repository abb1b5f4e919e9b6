"""The log's record of a model folder, and differences between a folder and its record. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from sftd.domain.errors import shorten

# A difference lists at most this number of config keys, and characters of a value.
_KEYS = 6
_VALUE = 60
# Licence files: exports copy them, but they do not affect a run.
_LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")


class ModelFile(msgspec.Struct, frozen=True):
    """Size and digest of a file. `sha256` covers the whole file. For a weight file it covers its size, its safetensors header
    and a sample of its tensors (see `wire/model/digest.py`), because reading all of it would delay submit too long."""

    bytes: int
    sha256: str


class ModelFiles(msgspec.Struct, frozen=True):
    """A model folder, by file name. `files` are config, tokenizer, chat templates, the model's own code, the index of the
    weights and licences; `weights` are the safetensors files. `contents` holds the parsed config.json and
    generation_config.json, so that changes can be listed by key; a file that is too large for the log is left out."""

    files: dict[str, ModelFile]
    weights: dict[str, ModelFile]
    contents: dict[str, dict[str, Any]] = {}

    @property
    def digest(self) -> str:
        """sha256 (hex) over all files except the weights."""
        return _digest(self.files)

    @property
    def weights_digest(self) -> str:
        """sha256 (hex) over the digests of the weight files."""
        return _digest(self.weights)


def _digest(files: dict[str, ModelFile]) -> str:
    lines = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(was: ModelFiles, now: ModelFiles, *, weights: bool, code: bool) -> dict[str, str]:
    """File → description of its difference from the record; empty if the folder matches the record.

    `weights`: compare the weight files too, which a run from a checkpoint does not read. `code`: compare the model's *.py
    files, because the run executes them.
    """
    found: dict[str, str] = {}
    for name in sorted(was.files.keys() | now.files.keys()):
        # The index matters only for reading the weights.
        is_read = weights if name.endswith(".safetensors.index.json") else code or not name.endswith(".py")
        if not is_read or name.startswith(_LICENCES):
            continue
        before, after = was.files.get(name), now.files.get(name)
        if before == after:
            continue
        if before is None or after is None:
            found[name] = "was not there" if before is None else "is gone"
        elif name in was.contents and name in now.contents:
            # A config with the same keys and values but another formatting is unchanged.
            if keys := list(_changed_keys(was.contents[name], now.contents[name])):
                more = f"; {len(keys) - _KEYS} more keys" if len(keys) > _KEYS else ""
                found[name] = "; ".join(keys[:_KEYS]) + more
        else:
            found[name] = f"sha256 is {after.sha256[:12]}…, was {before.sha256[:12]}…"
    if weights:
        for name in sorted(was.weights.keys() | now.weights.keys()):
            if detail := _other_weights(was.weights.get(name), now.weights.get(name)):
                found[name] = detail
    return found


def _other_weights(before: ModelFile | None, after: ModelFile | None) -> str:
    if before == after:
        return ""
    if before is None or after is None:
        return "was not there" if before is None else "is gone"
    if before.bytes != after.bytes:
        return f"has {after.bytes:,} bytes, had {before.bytes:,}"
    return "holds other weights"


def _changed_keys(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    before, after = _flat(was), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            yield f"{key} is gone, was {_shown(before[key])}"
        elif key not in before:
            yield f"{key} is {_shown(after[key])}, was not set"
        elif before[key] != after[key]:
            yield f"{key} is {_shown(after[key])}, was {_shown(before[key])}"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(value: Any) -> str:
    return shorten(msgspec.json.encode(value).decode(), _VALUE)
