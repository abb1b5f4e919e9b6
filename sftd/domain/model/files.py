"""What the log records of a model folder, and how a folder differs from its record. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from sftd.domain.errors import shorten

# A difference lists this many keys of a config, and this many characters of a value.
_KEYS = 6
_VALUE = 60
# What a licence asks to be passed on: it is kept for exports, but does not affect a run.
_LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")


class ModelFile(msgspec.Struct, frozen=True):
    """Size and digest of a file. `sha256` covers the whole file; of a weight file its size, its safetensors header and a
    sample of its tensors (see `wire/model/digest.py`), because a submit cannot wait until all of it is read."""

    bytes: int
    sha256: str


class ModelFiles(msgspec.Struct, frozen=True):
    """A model folder. `files` are config, tokenizer, chat templates, the model's own code, the index of the weights and
    licences, `weights` the safetensors files, by name. `contents` holds config.json and generation_config.json, parsed,
    so that a change can be named key by key; one that is too large for the log is left out."""

    files: dict[str, ModelFile]
    weights: dict[str, ModelFile]
    contents: dict[str, dict[str, Any]] = {}

    @property
    def digest(self) -> str:
        """sha256 (hex) over everything but the weights: names a copy of these files."""
        return _digest(self.files)

    @property
    def weights_digest(self) -> str:
        """sha256 (hex) over what is recorded of the weight files."""
        return _digest(self.weights)


def _digest(files: dict[str, ModelFile]) -> str:
    lines = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(was: ModelFiles, now: ModelFiles, *, weights: bool, code: bool) -> dict[str, str]:
    """File → how it differs from the record, in words; empty when the folder is as recorded.

    `weights`: compare the weight files too; a run that starts from a checkpoint does not read them. `code`: the model's
    own *.py files are executed, so they count.
    """
    found: dict[str, str] = {}
    for name in sorted(was.files.keys() | now.files.keys()):
        # The index only says which file holds which tensor.
        is_read = weights if name.endswith(".safetensors.index.json") else code or not name.endswith(".py")
        if not is_read or name.startswith(_LICENCES):
            continue
        before, after = was.files.get(name), now.files.get(name)
        if before == after:
            continue
        if before is None or after is None:
            found[name] = "was not there" if before is None else "is gone"
        elif name in was.contents and name in now.contents:
            # The same keys with the same values, written in another way, are the same config.
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
