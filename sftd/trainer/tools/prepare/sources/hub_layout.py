"""Finds the splits of a folder in the Hugging Face hub's layout, by the rules of `datasets.load_dataset(folder)`.

In this order: the `configs` at the head of README.md; `data/NAME-00000-of-00002.*`; folders named after a split; files
named after a split; all files, as train. A test compares the result with that of datasets.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sftd.domain.errors import Refused
from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.sources.file_kinds import READ, kind_of
from sftd.wire.spec.yaml_text import load_yaml

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_APART = "[-._ 0-9]"
_IN_FOLDER = ("**/{k}/**", "**/{k}{s}*/**", "**/*{s}{k}/**", "**/*{s}{k}{s}*/**")
_IN_FILE = ("**/{k}{s}*", "**/*{s}{k}{s}*")
_SHARDED = re.compile(r"data/([^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_SHARDS_OF = "data/{split}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]*.*"
_NOT_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# Breaks ties between formats with the same number of files.
_PREFERRED = (".parquet", ".arrow", ".jsonl", ".json", ".csv")


def hub_splits(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Split → files, and the data files without a split. Raises PrepareError when there is no readable file."""
    files = sorted(_files(folder))
    splits = _splits(folder, files)
    read = {name: _of_one_format(found) for name, found in splits.items()}
    read = {name: found for name, found in read.items() if found}
    taken = {file for found in read.values() for file in found}
    rest = [file for file in files if file not in taken and kind_of(Path(file)) and _visible(file, "**")]
    if not read:
        seen = f" It has {', '.join(rest[:5])}." if rest else ""
        raise PrepareError(
            f"{folder} is not a data set folder: it has no file that ends in {READ} and belongs to a split.{seen}"
        )
    return {name: [folder / file for file in found] for name, found in read.items()}, [
        folder / file for file in rest
    ]


def _files(folder: Path) -> Iterator[str]:
    """The paths of all files, relative to the folder, without sftd's own cards."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not name.endswith((".card.json", ".card.md")):
                yield path.relative_to(folder).as_posix()


def _splits(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    if (config := _configuration(folder)) is None:
        return _by_name(files)
    below = str(config.get("data_dir") or "").strip("./")
    part = [file.removeprefix(f"{below}/") for file in files if not below or file.startswith(f"{below}/")]
    given = config.get("data_files")
    found = _by_name(part) if given is None else _by_pattern(folder, part, _patterns(folder, given))
    return {split: [f"{below}/{file}" if below else file for file in names] for split, names in found.items()}


def _by_name(files: Sequence[str]) -> dict[str, list[str]]:
    sharded = [file for file in files if _SHARDED.fullmatch(file) and _visible(file, _SHARDS_OF)]
    names = dict.fromkeys(match[1] for file in sharded if (match := _SHARDED.fullmatch(file)))
    if names:
        return {name: _matching(files, [_SHARDS_OF.format(split=name)]) for name in names}
    for forms in (_IN_FOLDER, _IN_FILE):
        found = {}
        for split, words in _KEYWORDS.items():
            found[split] = _matching(files, [form.format(k=k, s=_APART) for k in words for form in forms])
        if any(found.values()):
            return {split: names for split, names in found.items() if names}
    return {"train": _matching(files, ["**"])}


def _by_pattern(
    folder: Path, files: Sequence[str], patterns: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    found = {}
    for split, wanted in patterns.items():
        for pattern in wanted:
            if not _matching(files, [pattern]) and not re.search(r"[*?[]", pattern):
                raise PrepareError(f"{folder / 'README.md'} names the file {pattern}, which is missing.")
        found[split] = _matching(files, wanted)
    return found


def _matching(files: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The files that match any of the patterns, in the order of the patterns."""
    found = [
        file
        for pattern in patterns
        for file in files
        if file.rpartition("/")[2] not in _NOT_DATA and _visible(file, pattern)
        if _matches(file.split("/"), pattern.split("/"))
    ]
    return list(dict.fromkeys(found))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] == "**":
        if len(pattern) == 1:
            return True
        return any(_matches(path[n:], pattern[1:]) for n in range(len(path)))
    return fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _visible(file: str, pattern: str) -> bool:
    """Whether the pattern names each hidden part of the path, and each folder such as __pycache__."""
    hidden = [[part for part in text.split("/") if part.startswith(".")] for text in (file, pattern)]
    special = [[part for part in text.split("/")[:-1] if part.startswith("__")] for text in (file, pattern)]
    return len(hidden[0]) == len(hidden[1]) and len(special[0]) == len(special[1])


def _of_one_format(files: Sequence[str]) -> list[str]:
    """The files of the split's most frequent format. Skips suffixes in capitals, which datasets does not support."""
    kinds = {
        file: kind for file in files if (kind := kind_of(Path(file))) is not None and kind.suffix in file
    }
    counts = Counter(kind.suffix for kind in kinds.values())
    if not counts:
        return []

    def rank(suffix: str) -> tuple[int, list[bool]]:
        return counts[suffix], [suffix == preferred for preferred in _PREFERRED]

    best = next(kind.format for kind in kinds.values() if kind.suffix == max(counts, key=rank))
    return [file for file, kind in kinds.items() if kind.format in (best, "")]


def _configuration(folder: Path) -> dict[str, Any] | None:
    """The default configuration in the head of README.md; None if there are no configurations."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path} cannot be read ({error}). Download the data set again.") from error
    head = re.match(r"(---\n.*?)\n---", text, re.DOTALL)
    try:
        given = load_yaml(head[1], f"The head of {path}") if head else None
    except Refused as error:
        problem = error.problems[0]
        raise PrepareError(f"{problem.where} {problem.what}. Fix it.") from error
    configs = given.get("configs") if isinstance(given, dict) else None
    if not configs:
        return None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise PrepareError(f"The configs of {folder / 'README.md'} are not a list of mappings. Fix them.")
    default = [
        c for c in configs if len(configs) == 1 or c.get("config_name") == "default" or c.get("default")
    ]
    if len(default) == 1:
        return default[0]
    names = ", ".join(str(config.get("config_name")) for config in configs)
    raise PrepareError(f"{folder} has several configurations ({names}). Name the files of one of them.")


def _patterns(folder: Path, given: Any) -> dict[str, list[str]]:
    """Split → patterns from a configuration's `data_files`."""
    entries = given if isinstance(given, list) and all(isinstance(e, dict) for e in given) else None
    if entries is None:
        entries = [{"split": "train", "path": given}]
    patterns = {}
    for entry in entries:
        path = entry.get("path")
        paths = path if isinstance(path, list) else [path]
        if not all(isinstance(one, str) and "://" not in one for one in paths) or "split" not in entry:
            raise PrepareError(
                f"The data_files of {folder / 'README.md'} are not file names or patterns of this folder. Fix them."
            )
        patterns[str(entry["split"])] = [one.removeprefix("./") for one in paths]
    return patterns
