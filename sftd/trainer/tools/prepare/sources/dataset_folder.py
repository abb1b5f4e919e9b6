"""Finds the files of a split in a Hugging Face data set folder, written by `save_to_disk` or in the hub's layout. Follows
the rules of the datasets library without using it (see `hub_layout`)."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.sources.file_kinds import kind_of
from sftd.trainer.tools.prepare.sources.hub_layout import hub_splits

# Other common names of the splits that datasets names train, validation and test.
_OTHER_NAMES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# One of several files, as in train-00000-of-00002.parquet.
_SHARD = re.compile(r"(.*?)[-_.](\d+)[-_.]of[-_.](\d+)(?!\d)")
# Maximum number of files or shards in a message.
_NAMED = 5


@dataclass(frozen=True)
class FoundFile:
    """A file to read. `name`: its path within the given folder, for cards."""

    path: Path
    name: str


@dataclass
class _Layout:
    """The splits of a folder, and the data files without a split. `is_one`: there is a single split, which counts as train
    whatever its name."""

    splits: dict[str, list[Path]]
    passed_over: list[Path] = field(default_factory=list)
    is_one: bool = False


def expand(sources: Sequence[Path], split: str) -> tuple[list[FoundFile], list[str]]:
    """The files of the sources in order; a folder means the files of its `split`. Also returns remarks on the choice,
    one sentence each. Raises PrepareError."""
    files: list[FoundFile] = []
    remarks: list[str] = []
    for source in sources:
        if not source.is_dir():
            files.append(FoundFile(source, source.name))
            continue
        layout = _layout(source)
        name = _choose(source, layout, split)
        chosen = layout.splits[name]
        if name != split and not layout.is_one:
            remarks.append(f"{source.resolve().name}: the split {name} is read as {split}")
        for other in layout.splits.keys() - {name}:
            if both := set(chosen) & set(layout.splits[other]):
                names = _list(sorted(path.name for path in both))
                remarks.append(f"{source.resolve().name}: in the split {other} as well are {names}")
        _refuse_incomplete(source, chosen)
        if layout.passed_over:
            names = _list(path.relative_to(source).as_posix() for path in layout.passed_over)
            remarks.append(
                f"{source.resolve().name}: these files belong to no split and are not read: {names}"
            )
        root = source.resolve()
        files += [FoundFile(path, f"{root.name}/{path.relative_to(source).as_posix()}") for path in chosen]
    return files, remarks


def _choose(folder: Path, layout: _Layout, split: str) -> str:
    """The name of the folder's split for `split`. Raises PrepareError."""
    splits = layout.splits
    for name in (split, _OTHER_NAMES.get(split, split)):
        if name in splits:
            return name
    if split == "train":
        names = [name for name in splits if layout.is_one or name.startswith("train")]
        if len(names) == 1:
            return names[0]
    raise PrepareError(
        f"{folder} has no split {split!r}; it has {', '.join(sorted(splits))}. Choose one of them with --split."
    )


def _layout(folder: Path) -> _Layout:
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list):
            raise PrepareError(f"{folder / 'dataset_dict.json'} names no splits. Save the data set again.")
        return _Layout({str(name): _saved(folder / str(name)) for name in names})
    if (folder / "state.json").is_file():
        name = _read_json(folder / "state.json").get("_split") or "train"
        return _Layout({str(name): _saved(folder)}, is_one=True)
    splits, rest = hub_splits(folder)
    return _Layout(splits, rest)


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote, in its order."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise PrepareError(
            f"{folder} stores a selection of rows as indices. Save it again after `flatten_indices()`."
        )
    listed = state.get("_data_files")
    named = isinstance(listed, list) and all(isinstance(e, dict) and "filename" in e for e in listed)
    if not named or not listed:
        raise PrepareError(f"{folder / 'state.json'} names no data files. Save the data set again.")
    return [folder / str(entry["filename"]) for entry in listed]


def _refuse_incomplete(folder: Path, files: Sequence[Path]) -> None:
    """Raise PrepareError when shards are missing or duplicated, or a file of the split cannot be read."""
    sets: dict[tuple[Path, str, int], list[int]] = {}
    for path in files:
        if (kind := kind_of(path)) is None or kind.unreadable:
            why = "" if kind is None else f": {kind.unreadable}"
            raise PrepareError(f"{path} belongs to the split but cannot be read{why}.")
        if shard := _SHARD.match(path.name):
            sets.setdefault((path.parent, shard[1], int(shard[3])), []).append(int(shard[2]))
    for (parent, prefix, total), found in sets.items():
        where = f"{folder}: of the {total} files {(parent / prefix).relative_to(folder).as_posix()}-…-of-{total:05d}"
        if len(set(found)) < len(found):
            twice = _list(sorted({f"{n:05d}" for n in found if found.count(n) > 1}))
            raise PrepareError(f"{where}, duplicated: {twice}. Remove the copies.")
        # Shards are numbered from 0; a few tools start at 1.
        first = 1 if total in found and 0 not in found else 0
        if missing := sorted(set(range(first, first + total)) - set(found)):
            names = _list(f"{n:05d}" for n in missing)
            raise PrepareError(f"{where}, missing: {names}. Download the data set again.")


def _list(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _NAMED
    return ", ".join(every[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path} cannot be read ({error}). Save the data set again.") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{path} is not a JSON object. Save the data set again.")
    return value
