"""Hugging Face data set folders: what `save_to_disk` writes, and what lies on the hub. Read without the datasets library."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftd.trainer.prepare.chat_files import SUFFIXES
from sftd.trainer.prepare.errors import PrepareError

# Names of the same splits, in the words of the hub.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_WORD = re.compile(r"[^a-z]+")
# How the hub itself names a split's files; the name may be the data set's own, such as train_sft.
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")


def expand(sources: Sequence[Path], split: str) -> list[Path]:
    """The files of these sources in order; a folder stands for those of its `split`. Raises PrepareError."""
    files: list[Path] = []
    for source in sources:
        files += _split_files(source, split) if source.is_dir() else [source]
    return files


def _split_files(folder: Path, split: str) -> list[Path]:
    splits = splits_of(folder)
    for name in _SPLITS.get(split, (split,)):
        if name in splits:
            return splits[name]
    if split == "train" and len(splits) == 1:
        return next(iter(splits.values()))
    raise PrepareError(
        f"{folder} has no split {split!r}; it has {', '.join(sorted(splits))}. Choose one of them with --split."
    )


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """Split → files of a data set folder. Raises PrepareError when it is none."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list):
            raise PrepareError(f"{folder / 'dataset_dict.json'} names no splits. Save the data set again.")
        return {str(name): _saved(folder / str(name)) for name in names}
    if (folder / "state.json").is_file():
        name = _read_json(folder / "state.json").get("_split") or "train"
        return {str(name): _saved(folder)}
    return _hub_files(folder)


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote, in its order."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise PrepareError(
            f"{folder} is a selection of rows, kept apart from them. Save it again after `flatten_indices()`."
        )
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not listed:
        raise PrepareError(f"{folder / 'state.json'} names no data files. Save the data set again.")
    return [folder / str(entry["filename"]) for entry in listed]


def _hub_files(folder: Path) -> dict[str, list[Path]]:
    """Files by the split in their names (train-00000-of-00002.parquet) or folders (train/0.jsonl); `train` without one."""
    splits: dict[str, list[Path]] = {}
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and path.is_file()
        and path.name not in ("dataset_info.json", "dataset_infos.json", "state.json")
        and not path.name.endswith(".card.json")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    for path in files:
        shard = _SHARD.match(path.name) if path.parent.name == "data" else None
        if shard is not None:
            splits.setdefault(shard[1], []).append(path)
            continue
        # The name says it before the folders do, the nearest folder first.
        parts = path.relative_to(folder).parts
        words = [word for part in reversed(parts) for word in _WORD.split(part.lower())]
        found = next((split for word in words for split, names in _SPLITS.items() if word in names), "train")
        splits.setdefault(found, []).append(path)
    if not splits:
        raise PrepareError(
            f"{folder} is no data set folder: there is no file in it that ends in {', '.join(SUFFIXES)}."
        )
    return splits


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path} cannot be read ({error}). Save the data set again.") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{path} is no JSON object. Save the data set again.")
    return value
