"""Which files of a folder `prepare` reads, beside what Hugging Face's datasets sees in the same folder."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.rows import conversation
from sftd.trainer.chat.shapes import RowKeys
from sftd.trainer.tools.prepare.sources.chat_files import open_source, pieces, rows_of
from sftd.trainer.tools.prepare.sources.dataset_folder import expand

ROW = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
# Each level doubles the one below.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30))
CONFIGS = "---\nlicense: mit\nconfigs:\n{}\n---\n# A data set\n"
# The files of a folder; of `README.md=TEXT` the text is that of the file.
LAYOUTS: dict[str, list[str]] = {
    "one file": ["a.jsonl"],
    "several": ["b.jsonl", "a.jsonl", "c/d.jsonl"],
    "train and test": ["train.jsonl", "test.jsonl"],
    "evaluation": ["train.jsonl", "evaluation.jsonl"],
    "eval": ["train.jsonl", "eval.jsonl"],
    "dev": ["train.json", "dev.json"],
    "valid": ["training_0.jsonl", "training_1.jsonl", "valid.jsonl", "testing.jsonl"],
    "beside train": ["train.jsonl", "rejected.jsonl", "holdout.json", "held_out/b.jsonl", "metadata.jsonl"],
    "shards in data": ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"],
    "named shards": [f"data/{s}-00000-of-00001.parquet" for s in ("train_sft", "test_sft", "train_gen")],
    "shards and others": ["data/train-00000-of-00001.parquet", "data/x.parquet", "more/y.parquet"],
    "hashes": ["data/train-00000-of-00001-abc123.parquet", "data/test-00000-of-00001-abc123.parquet"],
    "shards elsewhere": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl"],
    "mixed suffixes": [
        f"train-0000{n}-of-00004.{s}" for n, s in enumerate(["jsonl", "jsonl.gz", "ndjson", "jsonl"])
    ],
    "folders": ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
    "folders before files": ["train/test.jsonl", "test/train.jsonl"],
    "deep folders": ["a/b/train/c/0.jsonl", "a/b/validation-set/0.jsonl"],
    "word in folder": ["my-train-set/0.jsonl", "my test/0.jsonl", "other/0.jsonl"],
    "word without break": ["trained.jsonl", "contest.jsonl", "retrain.jsonl"],
    "plural": ["trains.jsonl", "tests.jsonl"],
    "digits": ["train2.jsonl", "train_10.jsonl", "test2.jsonl"],
    "suffix": ["chats_train.jsonl", "chats-test.jsonl", "chats.val.jsonl"],
    "only test": ["test.jsonl"],
    "both": ["train_test.jsonl", "test.jsonl"],
    "formats": ["a.jsonl", "b.jsonl", "c.csv"],
    "formats tie": ["a.jsonl", "b.parquet"],
    "csv": ["train.csv", "test.csv"],
    "readme": ["a.jsonl", "README.md=# chats", "config.json", "dataset_infos.json={}"],
    "hidden": ["a.jsonl", ".cache/b.jsonl", ".c.jsonl", "__pycache__/d.jsonl"],
    "capitals": ["train.jsonl", "train2.JSONL"],
    "capital words": ["Train.jsonl", "Test.jsonl"],
    "texts": ["train.jsonl", "train_2.jsonl", "train_notes.txt"],
    "order": ["a-b/x.jsonl", "a/x.jsonl", "B.jsonl"],
    "config": [
        "x.jsonl",
        "y.jsonl",
        "README.md="
        + CONFIGS.format(
            "- config_name: default\n  data_files:\n  - split: train\n    path: y.jsonl\n  - split: test\n    path: x.jsonl"
        ),
    ],
    "config patterns": [
        "a/0.jsonl",
        "a/1.jsonl",
        "b/0.jsonl",
        "README.md="
        + CONFIGS.format("- config_name: some\n  data_files:\n  - split: train\n    path: [a/*, 'b/**']\n"),
    ],
    "config text": [
        "a/0.jsonl",
        "b.jsonl",
        "README.md=" + CONFIGS.format("- config_name: some\n  data_files: '**/?.jsonl'"),
    ],
    "config default": [
        "a/train.jsonl",
        "b/train.jsonl",
        "README.md="
        + CONFIGS.format("- config_name: a\n  data_dir: a\n- config_name: b\n  data_dir: b\n  default: true"),
    ],
    "config data_dir": [
        "en/train.jsonl",
        "en/test.jsonl",
        "de/train.jsonl",
        "README.md=" + CONFIGS.format("- config_name: en\n  data_dir: en"),
    ],
}


def make(folder: Path, files: list[str]) -> None:
    for entry in files:
        name, _, text = entry.partition("=")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or ROW + "\n")


@pytest.fixture
def seen_by_datasets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Path], dict[str, list[str]]]:
    """Split → files of a folder, as `load_dataset(folder)` would read them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    load = importlib.import_module("datasets").load_dataset_builder

    def seen(folder: Path) -> dict[str, list[str]]:
        files = load(str(folder), cache_dir=str(tmp_path / "cache")).config.data_files
        # A file that matches two patterns of a split is there twice.
        return {
            str(split): list(dict.fromkeys(Path(f).relative_to(folder).as_posix() for f in found))
            for split, found in files.items()
        }

    return seen


def ours(folder: Path, splits: Any) -> dict[str, list[str]]:
    return {
        split: [file.path.relative_to(folder).as_posix() for file in expand([folder], split)[0]]
        for split in splits
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_of_a_split_are_those_that_datasets_reads(
    name: str, tmp_path: Path, seen_by_datasets: Callable[[Path], dict[str, list[str]]]
) -> None:
    folder = tmp_path / "set"
    make(folder, LAYOUTS[name])
    theirs = seen_by_datasets(folder)
    assert ours(folder, theirs) == theirs
    for split in {"train", "validation", "test"} - theirs.keys():
        if split != "train" or sum(known.startswith("train") for known in theirs) != 1:
            with pytest.raises(PrepareError, match=r"has no split .* Choose one of them with --split"):
                expand([folder], split)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train-00000-of-00004.jsonl", "train-00002-of-00004.jsonl"],
            r"of the 4 files train-…-of-00004, missing: 00001, 00003",
        ),
        (["data/train-00001-of-00003.parquet"], r"data/train-…-of-00003, missing: 00000, 00002"),
        (["train-1-of-2.jsonl", "train-2-of-2.jsonl.gz", "train-2-of-2.jsonl"], r"duplicated: 00002"),
        (["train.parquet.gz"], r"train.parquet.gz belongs to the split but cannot be read: decompress it"),
        (["train.zip"], r"train.zip belongs to the split but cannot be read: unpack it"),
        (
            ["train.jsonl", "README.md=---\nconfigs: [a\n---\n"],
            r"The head of .*README.md, line 2 is not valid YAML",
        ),
        (
            ["train.jsonl", f"README.md=---\n{BOMB}\n---\n"],
            r"README.md, line \d+ is not valid YAML: its aliases expand",
        ),
        (
            ["a.jsonl", "README.md=---\nconfigs:\n- config_name: x\n  data_files: b.jsonl\n---\n"],
            r"names the file b.jsonl, which is missing",
        ),
        (
            ["a.jsonl", "README.md=---\nconfigs:\n- config_name: x\n- config_name: y\n---\n"],
            r"has several configurations \(x, y\)",
        ),
        (["notes.txt", "a.JSONL"], r"is not a data set folder.*It has a.JSONL"),
    ],
)
def test_a_folder_that_is_not_whole_or_not_clear_is_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    make(tmp_path, files)
    with pytest.raises(PrepareError, match=message):
        expand([tmp_path], "train")


def test_shards_may_be_counted_from_one(tmp_path: Path) -> None:
    make(tmp_path, ["part_1_of_2.jsonl", "part_2_of_2.jsonl"])
    assert ours(tmp_path, ["train"]) == {"train": ["part_1_of_2.jsonl", "part_2_of_2.jsonl"]}


def test_files_passed_over_and_splits_chosen_are_named(tmp_path: Path) -> None:
    make(tmp_path / "a", ["train.jsonl", "rejected.jsonl", "x/holdout.csv.gz", "notes.txt"])
    assert expand([tmp_path / "a"], "train")[1] == [
        "a: these files belong to no split and are not read: rejected.jsonl, x/holdout.csv.gz"
    ]
    make(tmp_path / "b", [f"data/{s}-00000-of-00001.parquet" for s in ("train_sft", "test_sft")])
    assert expand([tmp_path / "b"], "train")[1] == ["b: the split train_sft is read as train"]
    make(tmp_path / "c", ["train_test.jsonl", "test.jsonl"])
    assert expand([tmp_path / "c"], "train")[1] == ["c: in the split test as well are train_test.jsonl"]
    for split, files in {"dev": "validation", "evaluation": "test"}.items():
        make(tmp_path / "d", ["train.jsonl", "validation.jsonl", "test.jsonl"])
        assert ours(tmp_path / "d", [split]) == {split: [f"{files}.jsonl"]}


def chats(*answers: Any, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": a}], **fields}
        for n, a in enumerate(answers)
    ]


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"enum": [1, 2]}}}}},
]
ODD_ROWS = {
    "contents": chats('line "one"\nline two', [{"type": "text", "text": "part"}]),
    "messages": [
        *chats("plain"),
        {
            "messages": [
                {"role": "user", "content": "q", "name": "Bo"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1", "y": None}}}],
                },
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "a", "weight": 1, "reasoning_content": "hm"},
            ]
        },
    ],
    "tools": [{**chats("a")[0], "tools": TOOLS[:1]}, {**chats("b")[0], "tools": TOOLS}],
    "tools in text": [{**chats("a")[0], "tools": TOOLS[:1]}, {**chats("b")[0], "tools": "[]"}],
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_what_datasets_saves_is_read_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets keeps fields that are not alike in all rows as columns of JSON text."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = importlib.import_module("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS[name]))
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    loaded.save_to_disk(tmp_path / "saved")
    loaded["train"].to_parquet(tmp_path / "b.parquet")
    wanted = [conversation(row) for row in ODD_ROWS[name]]
    (saved,), _ = expand([tmp_path / "saved"], "train")
    for path in (saved.path, tmp_path / "b.parquet"):
        read = [row for piece in pieces(open_source(path), RowKeys()) for _, row in rows_of(piece)]
        assert [conversation(row) for row in read] == wanted
    if name != "tools":
        assert "arrow.json" in str(pq.read_schema(tmp_path / "b.parquet"))
