"""The demo's chats: the same in every process, cleanly split, and of one style."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.stdlib_chats import summarize, write_stdlib_chats


def generate(out_dir: Path, *options: str, **environment: str) -> dict[str, Any]:
    """Run the tool as the CLI does, and return its only line of output."""
    command = [sys.executable, "-m", "sftd.trainer.tools.prepare", "stdlib-chats", str(out_dir), *options]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    done: dict[str, Any] = json.loads(result.stdout)
    return done


def read(path: Path) -> dict[str, str]:
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    for question, answer in chats:
        assert (question["role"], answer["role"]) == ("user", "assistant")
    pairs = {question["content"]: answer["content"] for question, answer in chats}
    assert len(pairs) == len(chats)
    return pairs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out_dir = tmp_path_factory.mktemp("chats")
    return out_dir, generate(out_dir, PYTHONHASHSEED="1")


def test_another_process_writes_the_same_bytes(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    first_dir, first = written
    second = generate(tmp_path, PYTHONHASHSEED="2", LC_ALL="C", COLUMNS="40")
    for name in ("train", "val"):
        assert (first_dir / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
        assert first[name]["sha256"] == second[name]["sha256"]


def test_there_are_thousands_of_chats_and_the_split_is_disjoint(written: tuple[Path, dict[str, Any]]) -> None:
    out_dir, done = written
    train, val = read(out_dir / "train.jsonl"), read(out_dir / "val.jsonl")
    assert (len(train), len(val)) == (done["train"]["rows"], done["val"]["rows"])
    assert len(train) > 2000
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.07
    assert not train.keys() & val.keys()
    assert not set(train.values()) & set(val.values())
    for answer in [*train.values(), *val.values()]:
        assert 3 <= len(answer.split()) <= 60
        assert answer == " ".join(answer.split())
        assert answer[-1] in ".!?"


def test_the_names_are_those_that_people_use(written: tuple[Path, dict[str, Any]]) -> None:
    chats = read(written[0] / "train.jsonl") | read(written[0] / "val.jsonl")
    for name in ("function `os.path.join`", "function `len`", "method `str.upper`", "function `asyncio.run`"):
        assert f"What does the Python {name} do?" in chats
    assert not any("`posixpath." in question for question in chats)
    assert chats["What does the Python function `len` do?"] == "Return the number of items in a container."


def test_fewer_chats_are_a_part_of_all(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    done = generate(tmp_path, "--rows", "100")
    assert done["train"]["rows"] + done["val"]["rows"] == 100
    assert read(tmp_path / "train.jsonl").items() <= read(written[0] / "train.jsonl").items()
    smallest = generate(tmp_path, "--rows", "2")
    assert (smallest["train"]["rows"], smallest["val"]["rows"]) == (1, 1)


def test_too_few_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="at least 2"):
        write_stdlib_chats(tmp_path, rows=1)


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Return the\n  sum of x.\n\nMore.", "Return the sum of x."),
        ("f(x[, y]) -> int\n\nReturn the sum", "Return the sum."),
        ("Return these values:", "Return these values."),
        ("S.f(x) -> int", None),
        ("Return it.", None),
        ("helper of the above thing.", None),
        ("Use it like >>> f(1).", None),
        ("Word " * 61, None),
        ("", None),
    ],
)
def test_a_summary_is_one_sentence_like_line(doc: str, summary: str | None) -> None:
    assert summarize(doc) == summary
