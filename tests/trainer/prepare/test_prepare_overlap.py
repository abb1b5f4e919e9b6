"""Chats that occur again: within the sources, and in validation data; and rows that are near-empty or too long."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.tokenize_files import TokenizeOptions, tokenize_files
from sftd.trainer.tools.protocol import EventWriter
from tests.builders.trainer.chat_templates import FAMILIES, byte_level_tokenizer, unmarked

LONG = "a long answer "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    byte_level_tokenizer("qwen2.5", unmarked(FAMILIES["qwen2.5"])).save_pretrained(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 60}')
    return folder


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    byte_level_tokenizer("qwen3", unmarked(FAMILIES["qwen3"])).save_pretrained(tmp_path / "thinker")
    return tmp_path / "thinker"


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(source: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    events = EventWriter(io.StringIO())
    done = tokenize_files([source], model, out, TokenizeOptions(workers=1, **options), events)
    return done | {"card": json.loads(Path(done["card"]).read_text())}


def test_dedupe_keeps_the_first_of_chats_alike(thinker: Path, tmp_path: Path) -> None:
    wanted = [
        chat("What is it?", "An elk."),
        chat(" what  IS it?", "an\nelk."),
        chat("What is it?", "An elk!"),
        # A chat of two rows, of which neither repeats the other.
        chat("q", "<think>\nhm\n</think>\n\na", "q", "<think>\nhm\n</think>\n\na"),
        chat("What is it?", "An elk.", weight=2),
    ]
    source = write(tmp_path / "c.jsonl", wanted)
    every = prepare(source, thinker, tmp_path / "t.parquet", rewritten="split")
    assert (every["rows"], every["dropped"]) == (6, 0)
    done = prepare(source, thinker, tmp_path / "u.parquet", rewritten="split", dedupe=True)
    assert (done["rows"], done["dropped"]) == (4, 2)
    kept = pq.read_table(tmp_path / "u.parquet")["input_ids"].to_pylist()
    before = pq.read_table(tmp_path / "t.parquet")["input_ids"].to_pylist()
    assert kept == [before[0], *before[2:5]]
    assert done["card"]["chats"]["dropped_by_reason"] == {"it repeats an earlier chat": 2}
    assert "2 of the training chats repeat an earlier one: left out" in done["warnings"]


@pytest.mark.parametrize("way", ["against", "val_split", "val_rows"])
def test_training_rows_that_validation_data_has_are_found(way: str, model: Path, tmp_path: Path) -> None:
    held_out = [chat("Old?", "yes"), chat("Asked?", "one"), {"prompt": "Only asked?", "reference": "x"}]
    train = [
        chat("new 0?", LONG),
        chat("old?", " Yes"),
        chat("asked?", "two"),
        *(chat(f"new {n}?", LONG) for n in (3, 4)),
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    options: dict[str, Any] = {way: "test"}
    rows, source = 5, folder
    if way == "against":
        source = write(folder / "train.jsonl", [*train, chat("only  asked?", LONG)])
        options, rows = {"against": (write(tmp_path / "eval.jsonl", held_out),)}, 6
    elif way == "val_split":
        write(folder / "train.jsonl", train)
        write(folder / "test.jsonl", held_out[:2])
    else:
        # Rows for validation are chosen by a hash: all of the same question are alike to both sides.
        source = write(folder / "train.jsonl", [chat("Same?", f"{LONG}{n}") for n in range(rows + 2)])
        options = {"val_rows": 2}
    done = prepare(source, model, tmp_path / "t.parquet", **options)
    assert done["rows"] == rows
    found = done["card"]["validation_overlap"]
    same, asked, first = {
        "against": (1, 2, [1, 2, 5]),
        "val_split": (1, 1, [1, 2]),
        "val_rows": (0, 5, [0, 1, 2, 3, 4]),
    }[way]
    assert found["training_rows_with_the_same_chat"] == same
    assert found["training_rows_with_the_same_prompt_only"] == asked
    assert found["first_training_rows"] == first
    assert any(
        "validation data" in text and text.endswith(", ".join(map(str, first))) for text in done["warnings"]
    )
    if way == "val_rows":
        with pytest.raises(
            PrepareError, match=r"train on: 5 rows were dropped \(the validation data has its"
        ):
            prepare(source, model, tmp_path / "t.parquet", drop_overlap=True, **options)
        with pytest.raises(PrepareError, match="A fraction for validation is chosen while"):
            prepare(source, model, tmp_path / "t.parquet", drop_overlap=True, val_fraction=0.5)
        return
    done = prepare(source, model, tmp_path / "t.parquet", drop_overlap=True, **options)
    assert (done["rows"], done["dropped"]) == (rows - same - asked, same + asked)
    assert done["card"]["validation_overlap"]["first_training_rows"] == []
    assert f"{same + asked} of the training chats are in the validation data: left out" in done["warnings"]


def test_a_file_to_compare_with_must_hold_chats_or_questions(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", [chat("q", LONG)])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "q"}, {"x": 1}])
    with pytest.raises(PrepareError, match=r"bad.jsonl, line 2: there is no chat .* from --against"):
        prepare(source, model, tmp_path / "t.parquet", against=(bad,))


def test_near_empty_and_long_rows_are_named(model: Path, tmp_path: Path) -> None:
    rows = [chat("q", LONG), chat("q", "a"), chat("q", LONG), chat("q", LONG * 9)]
    source = write(tmp_path / "c.jsonl", rows)
    done = prepare(source, model, tmp_path / "t.parquet")
    assert done["card"]["near_empty_rows"] == {
        "trained_tokens_below": 4,
        "rows": 1,
        "first": ["c.jsonl, line 2"],
    }
    assert done["card"]["long_rows"] == {"tokens_above": 60, "rows": 1, "first": ["c.jsonl, line 4"]}
    assert done["warnings"] == [
        "1 of 4 chats repeat another one word for word",
        f"the longest row has {done['max_length']} tokens, but the model was trained with a context of 60; 1 row, c.jsonl, line 4",
        "fewer than 4 trained tokens: 1 row, c.jsonl, line 2",
    ]
    done = prepare(source, model, tmp_path / "t.parquet", max_length=59)
    assert done["card"]["long_rows"]["tokens_above"] == 59
    assert "c.jsonl, line 4" in done["card"]["long_rows"]["first"]
    # Answers that are all short are meant to be.
    short = write(tmp_path / "d.jsonl", [rows[1], chat("p", "b")])
    assert prepare(short, model, tmp_path / "t.parquet")["warnings"] == []
