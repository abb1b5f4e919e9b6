"""Read a Hugging Face model folder without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.errors import Problem, Refused, shorten
from sftd.domain.model.families import FAMILIES
from sftd.domain.model.family import ROPE_KEYS
from sftd.domain.model.rules import check_architecture
from sftd.domain.model.shape import ModelShape
from sftd.domain.text.words import counted
from sftd.wire.model.digest import INDEX, read_header, weight_files
from sftd.wire.model.text_part import is_vision_language, text_config, with_text

_WHERE = "model.partial_pretrain"
_MISSING: Any = object()
# A tokenizer needs one of these files.
_TOKENIZER = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken", "*.py")


def read_config(folder: str, override: dict[str, Any]) -> dict[str, Any]:
    """config.json of the language model in a folder, updated with `override`. Raises `Refused`."""
    return text_config(_whole_config(folder)) | override


def _whole_config(folder: str) -> dict[str, Any]:
    path = Path(folder)
    fix = "give a folder that holds config.json, *.safetensors and the tokenizer"
    if path.is_file():
        raise Refused(Problem(_WHERE, f"{folder} is a file", "give the folder that holds config.json"))
    if not path.is_dir():
        raise Refused(Problem(_WHERE, f"no such folder: {folder}", fix))
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise Refused(Problem(_WHERE, f"{folder} holds no config.json", fix)) from None
    except (ValueError, OSError, RecursionError) as error:
        raise Refused(Problem(_WHERE, f"{folder}/config.json cannot be read: {error}", fix)) from None
    if not isinstance(config, dict):
        raise Refused(Problem(_WHERE, f"{folder}/config.json is not a mapping", fix))
    return config


def read_shape(folder: str, override: dict[str, Any]) -> ModelShape:
    """Shape of the model in `folder`. Raises `Refused` when it cannot be read or lacks a needed key."""
    config = read_config(folder, override)
    # Check this first: an unsupported architecture lacks keys, and a missing key would be a misleading error.
    architecture = _architecture(config)
    if problem := check_architecture(architecture):
        if is_vision_language(config):
            kind = shorten(str(config["text_config"].get("model_type")))
            problem = msgspec.structs.replace(
                problem, what=f"{problem.what} (the model_type inside is {kind})"
            )
        raise Refused(problem)
    try:
        return FAMILIES[architecture].shape(config, override)
    except KeyError as error:
        raise Refused(
            Problem(
                _WHERE, f"{folder}/config.json has no {error}", "give the folder of a causal language model"
            )
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Refused(
            Problem(_WHERE, f"{folder}/config.json: {error}", "fix config.json or model.override_config")
        ) from None


def is_language_part(folder: str) -> bool:
    """Whether the language model in a folder is inside a vision-language model. Raises `Refused`."""
    whole = _whole_config(folder)
    return text_config(whole) is not whole


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def exported_config(folder: str, override: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for weights of `dtype` ("bfloat16", …) that were trained from `folder` with `override`.

    `read_shape` returns the same shape for it as for `folder` with `override`. Raises `Refused`.
    """
    whole = _whole_config(folder)
    before = text_config(whole)
    config = before | override
    if not override.keys().isdisjoint(ROPE_KEYS):
        # Write both formats in full: transformers 4 reads the two keys, transformers 5 the one mapping.
        shape = read_shape(folder, override)
        scaling, theta = shape.rope_scaling, {"rope_theta": shape.rope_theta}
        config |= {"rope_scaling": scaling, **theta}
        # Those that no override has: which dimensions are rotated, and the positions of images.
        kept = {
            name: value
            for name, value in (before.get("rope_parameters") or {}).items()
            if name == "partial_rotary_factor" or name.startswith("mrope_")
        }
        rope = kept | {"rope_type": "default"} | (scaling or {}) | theta
        if (local := shape.window_rope_theta) is not None:
            config["rope_local_base_freq"] = local
            rope = {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        config["rope_parameters"] = rope
    # The exported weights are not compressed.
    config.pop("quantization_config", None)
    key = "torch_dtype" if "torch_dtype" in whole and "dtype" not in whole else "dtype"
    if before is whole:
        return config | {key: dtype}
    changed = {name: value for name, value in config.items() if before.get(name, _MISSING) != value}
    if key in before:
        changed[key] = dtype
    return with_text(whole, changed) | {key: dtype}


def check_weights(folder: str) -> None:
    """Check that the folder has all shards of its safetensors weights. Raises `Refused`."""
    path = Path(folder)
    try:
        files = weight_files(path)
        missing = [name for name in files if not (path / name).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        what = f"{path / INDEX} cannot be read: {error}"
        raise Refused(Problem(_WHERE, what, "fetch the model again")) from None
    if missing:
        what = f"{folder} lacks {counted(len(missing), 'weight file')}, such as {missing[0]}"
        raise Refused(Problem(_WHERE, what, "fetch the model again"))
    if not files:
        raise Refused(
            Problem(_WHERE, f"{folder} holds no *.safetensors", "save the model with safe_serialization")
        )
    for file in sorted(path.glob("*.safetensors")):
        if not _is_whole(file):
            raise Refused(
                Problem(_WHERE, f"{file} is cut short or not a safetensors file", "fetch the model again")
            )


def _is_whole(file: Path) -> bool:
    """Whether a file is a complete safetensors file."""
    try:
        return bool(tensors(file))
    except (OSError, ValueError):
        return False


def tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in a safetensors file: 8 bytes of length, the header, the data. Raises `OSError`, and
    `ValueError` when the size of the file does not match its header."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            _, header = read_header(stream, size)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        if size != 8 + len(header) + max(ends, default=0):
            raise ValueError("its size does not match its header")
        return {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error}") from None


def stop_ids(folder: str) -> tuple[int, ...]:
    """The ids of the end-of-generation tokens in config.json and generation_config.json; empty if there are none."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            named = text_config(json.loads((Path(folder) / name).read_text())).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        found.update(i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int))
    return tuple(sorted(found))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer file."""
    return any(any(folder.glob(name)) for name in _TOKENIZER)
