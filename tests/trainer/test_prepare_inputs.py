"""What `prepare` reads: every shape of row, every kind of file and folder; splits, the card, rows left out, workers."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.trainer.prepare import chat_files, tokenize_files
from sftd.trainer.prepare.chat_files import Piece, open_source, pieces, rows_of
from sftd.trainer.prepare.chat_rows import conversation
from sftd.trainer.prepare.dataset_folder import expand
from sftd.trainer.prepare.errors import ChatError, PrepareError
from sftd.trainer.prepare.progress import EventWriter
from sftd.trainer.prepare.splitting import SmallestKeys
from sftd.trainer.prepare.tokenize_pieces import TokenizeOptions
from tests.trainer.chat_templates import FAMILIES, byte_level_tokenizer, unmarked

QUESTION = [{"role": "user", "content": "q"}]
ANSWER = [{"role": "assistant", "content": "a"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family in ("qwen2.5", "qwen3"):
        folders[family] = tmp_path_factory.mktemp("models") / family
        byte_level_tokenizer(family, unmarked(FAMILIES[family])).save_pretrained(folders[family])
    return folders


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": QUESTION + ANSWER}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
        ),
        ({"prompt": "q", "completion": "a"}, "prompt+completion"),
        ({"prompt": QUESTION, "completion": ANSWER}, "prompt+completion"),
        ({"prompt": "q", "response": "a", "messages": None}, "prompt+response"),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction+output"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *ANSWER]}, "messages"),
    ],
)
def test_a_chat_is_the_same_in_every_shape(row: dict[str, Any], shape: str) -> None:
    chat = conversation(row, None)
    assert (chat.messages, chat.tools, chat.shape) == (QUESTION + ANSWER, None, shape)
    assert chat.key() == conversation({"messages": QUESTION + ANSWER}, None).key()
    with_system = conversation(row | {"system": "s"}, None)
    assert with_system.messages == [{"role": "system", "content": "s"}, *QUESTION, *ANSWER]


def test_alpacas_input_and_history_are_part_of_the_chat() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}
    contents = [message["content"] for message in conversation(row, None).messages]
    assert contents == ["Hi", "Hello", "Add.\n\n1, 2", "3"]


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_tool_calls_come_as_templates_expect_them(call: dict[str, Any]) -> None:
    result = {"from": "observation", "value": "2"}
    chat = conversation({"messages": [*QUESTION, call, result, *ANSWER], "tools": json.dumps([CALL])}, None)
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.messages[2] == {"role": "tool", "content": "2"}
    assert chat.tools == [CALL]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [*QUESTION, {**ANSWER[0], "weight": 0}]},
            "all of the assistant's messages have the weight 0",
        ),
        ({"messages": [*QUESTION, {**ANSWER[0], "weight": 0.5}]}, "weight 0.5; it can only be 0 or 1"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "tool_calls": ["f"]}]},
            "tool call of message 2 is not an obj",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "tool calls of message 1 are text that is not",
        ),
        ({"messages": QUESTION + ANSWER, "tools": "{"}, "the field 'tools' is text that is not JSON"),
        ({"messages": QUESTION + ANSWER, "tools": [1]}, "must be a list of objects"),
        ({"prompt": 1, "completion": "a"}, "one is a number: each is a text or a list"),
        ({"instruction": "q", "output": 1}, "instruction and output must be texts"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        conversation(row, None)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"q{n}"}, *ANSWER]} for n in range(start, start + count)
    ]


def read(path: Path) -> list[Any]:
    return [row for piece in pieces(open_source(path), None) for _, row in rows_of(piece)]


def save_arrow(path: Path, table: pa.Table, *, stream: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many pieces, and objects that lie across the blocks in which the file is read.
    monkeypatch.setattr(chat_files, "_PIECE_ROWS", 7)
    monkeypatch.setattr(chat_files, "_BLOCK", 50)
    wanted = rows(40)
    table = pa.Table.from_pylist([{**row, "id": 1} for row in wanted])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    save_arrow(tmp_path / "b.arrow", table)
    save_arrow(tmp_path / "c.arrow", table, stream=False)
    (tmp_path / "d.json").write_text(json.dumps(wanted, indent=1))
    write_jsonl(tmp_path / "e.json", wanted)
    write_jsonl(tmp_path / "f.jsonl", wanted)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == wanted, path
        assert open_source(path).rows == 40
        assert [p.first for p in pieces(open_source(path), None)][:2] == [1, 8]
    (tmp_path / "d.json").write_text('[{"messages": 1}, {"mess')
    with pytest.raises(PrepareError, match=r"d.json, row 2 is not JSON"):
        read(tmp_path / "d.json")


def test_the_columns_of_other_rows_are_not_taken_for_nulls(tmp_path: Path) -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"x": 1}}},
        {"function": {"name": "g", "arguments": {"y": "2"}}},
    ]
    table = pa.Table.from_pylist(
        [
            {"messages": [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
            for call in calls
        ]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (piece,) = pieces(open_source(tmp_path / "a.parquet"), None)
    read = [conversation(row, None, fills_nulls=True).messages[1]["tool_calls"] for _, row in rows_of(piece)]
    assert [call["function"]["arguments"] for (call,) in read] == [{"x": 1}, {"y": "2"}]


def test_folders_of_hugging_face_data_sets(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(3))
    saved = tmp_path / "saved"
    for split in ("train", "test"):
        for n in range(2):
            save_arrow(saved / split / f"data-{n}.arrow", table)
        files = [{"filename": f"data-{n}.arrow"} for n in (1, 0)]
        (saved / split / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))
        (saved / split / "dataset_info.json").write_text("{}")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert expand([saved], "train") == [saved / "train" / f"data-{n}.arrow" for n in (1, 0)]
    assert expand([saved / "test"], "train") == expand([saved], "test")
    with pytest.raises(PrepareError, match=r"has no split 'validation'; it has test, train. Choose"):
        expand([saved], "validation")
    (saved / "test" / "state.json").write_text('{"_data_files": [], "_indices_files": ["i.arrow"]}')
    with pytest.raises(PrepareError, match=r"flatten_indices"):
        expand([saved / "test"], "test")

    hub = tmp_path / "hub"
    for name in (
        "data/train-00001-of-2.jsonl",
        "data/train-00000-of-2.jsonl",
        "val/0.jsonl",
        ".cache/train.jsonl",
    ):
        write_jsonl(hub / name, rows(1))
    (hub / "README.md").write_text("x")
    assert [path.name for path in expand([hub], "train")] == [
        "train-00000-of-2.jsonl",
        "train-00001-of-2.jsonl",
    ]
    assert expand([hub], "validation") == [hub / "val/0.jsonl"]
    with pytest.raises(PrepareError, match="is no data set folder"):
        expand([hub / "val"], "train") and expand([tmp_path / "saved" / "nowhere"], "train")
        (tmp_path / "empty").mkdir()
        expand([tmp_path / "empty"], "train")


def prepare(source: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    made = TokenizeOptions(**options)
    return tokenize_files.tokenize_files([source], model, out, made, EventWriter(io.StringIO()))


def test_any_number_of_workers_makes_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A bad row in the middle, and duplicates.
    wanted = [*rows(700), {"messages": QUESTION}, *rows(700)]
    source = write_jsonl(tmp_path / "chats.jsonl", wanted)
    options: dict[str, Any] = {"skip_bad_rows": True, "val_rows": 60, "max_length": 52}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        done = prepare(
            source,
            models["qwen2.5"],
            folder / "t.parquet",
            val_out=folder / "v.parquet",
            workers=workers,
            **options,
        )
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["t.parquet", "t.parquet.card.json", "t.parquet.card.md", "v.parquet"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    # Each chat is there twice, so that 60 rows are 30 chats, all on one side, and none is lost.
    assert (done["rows"], done["val"]["rows"], done["rejected"]) == (1340, 60, 1)
    train, val = (
        Counter(map(tuple, pq.read_table(tmp_path / "2" / f"{n}.parquet")["input_ids"].to_pylist()))
        for n in "tv"
    )
    assert not train.keys() & val.keys()
    assert set((train | val).values()) == {2}


def test_the_card_says_what_was_done(models: dict[str, Path], tmp_path: Path) -> None:
    long = {"messages": [*QUESTION, {"role": "assistant", "content": "y" * 30}]}
    bad = {"messages": [*QUESTION, {"role": "assistant", "content": ""}]}
    wanted = [
        rows(1)[0],
        bad,
        {"prompt": "q", "completion": "a"},
        long,
        "text",
        bad,
        {"prompt": "z" * 90, "completion": "a"},
    ]
    source = write_jsonl(tmp_path / "chats.jsonl", wanted)
    out = tmp_path / "out.parquet"
    done = prepare(source, models["qwen2.5"], out, skip_bad_rows=True, max_length=60)
    card = json.loads(Path(done["card"]).read_text())
    assert card["sources"] == [
        {"name": "chats.jsonl", "split": "train", "rows": 7, "sha256": open_source(source).sha256}
    ]
    assert card["shapes"] == {"messages": 2, "prompt+completion": 2}
    assert (card["chats"]["used"], card["chats"]["rejected"]) == (4, 3)
    assert sorted(card["chats"]["rejected_by_reason"].values()) == [1, 2]
    assert card["chats"]["rejected_first"][0]["place"] == "chats.jsonl, line 2"
    assert card["chats"]["dropped_by_reason"] == {"no trained token is left": 1}
    made = card["outputs"]["train"]
    table = pq.read_table(out)
    labels = [label for row in table["labels"].to_pylist() for label in row]
    assert made["sha256"] == done["sha256"]
    assert made["rows"] == table.num_rows == 3
    assert (made["tokens"], made["trained_tokens"]) == (len(labels), sum(label != -100 for label in labels))
    assert made["truncated"] == 1
    # What is cut off is the end of the answer, its stop token, and the newline behind it.
    assert made["cut_tokens"] == made["cut_trained_tokens"] + 1
    assert any(f"truncation has cut {made['cut_trained_tokens']} tokens" in text for text in card["warnings"])
    text = Path(done["card_text"]).read_text()
    assert f"| train: out.parquet | 3 | {len(labels)} |" in text
    assert "- chats.jsonl, line 2: message 2 is an empty answer" in text
    assert str(tmp_path) not in text + json.dumps(card)
    with pytest.raises(PrepareError, match=r"line 2: message 2 is an empty answer"):
        prepare(source, models["qwen2.5"], out, max_length=60)


def test_the_splits_of_a_folder_are_kept_and_a_leak_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set/train.jsonl", rows(10))
    write_jsonl(tmp_path / "set/test.jsonl", rows(4, start=8))
    options: dict[str, Any] = {"val_split": "test", "val_out": tmp_path / "v.parquet"}
    done = prepare(tmp_path / "set", models["qwen2.5"], tmp_path / "t.parquet", **options)
    assert (done["rows"], done["val"]["rows"]) == (10, 4)
    assert done["warnings"] == ["2 training rows have chats that are in the validation split as well"]
    with pytest.raises(PrepareError, match="none of the sources is a folder"):
        prepare(tmp_path / "set/train.jsonl", models["qwen2.5"], tmp_path / "t.parquet", **options)


def test_text_that_is_taken_for_special_tokens_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "c.jsonl", [*rows(3), {"prompt": "What is <|im_end|>?", "completion": "a"}]
    )
    done = prepare(source, models["qwen2.5"], tmp_path / "t.parquet")
    assert [text.partition(" that")[0] for text in done["warnings"]] == [
        "1 chats have text in their messages, tool calls or tools"
    ]


def test_reasoning_of_earlier_turns_becomes_rows_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
    source = write_jsonl(tmp_path / "c.jsonl", [{"messages": [*QUESTION, thought, *QUESTION, thought]}])
    with pytest.raises(PrepareError, match=r"line 1: the chat template changes the assistant's message 2"):
        prepare(source, models["qwen3"], tmp_path / "t.parquet")
    assert prepare(source, models["qwen3"], tmp_path / "t.parquet", rewritten="split")["rows"] == 2
    masked = prepare(source, models["qwen3"], tmp_path / "t.parquet", rewritten="mask")
    assert masked["rows"] == 1
    assert "1 answers are not trained" in masked["warnings"][0]


@given(st.lists(st.integers(0, 30), min_size=1), st.integers(1, 12))
def test_the_smallest_keys_are_chosen_whatever_the_order(numbers: list[int], wanted: int) -> None:
    keys = SmallestKeys(wanted)
    for number in numbers:
        keys.add(number.to_bytes(8, "big"))
    chosen = [n for n in numbers if n.to_bytes(8, "big") in keys]
    assert len(chosen) >= min(wanted, len(numbers))
    # No more than it takes: without the greatest chat there would be too few.
    assert len([n for n in chosen if n != max(chosen)]) < wanted
    assert all(n > max(chosen) for n in numbers if n not in chosen)


def test_what_lies_in_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Pieces are bounded in rows and in bytes, whatever the file's row groups are."""
    table = pa.Table.from_pylist(rows(5000))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5000)
    write_jsonl(
        tmp_path / "b.jsonl",
        [*rows(1000), {"messages": [*QUESTION, {**ANSWER[0], "content": "x" * 3_000_000}]}],
    )
    for name in ("a.parquet", "b.jsonl"):
        made: list[Piece] = list(pieces(open_source(tmp_path / name), None))
        assert all(len(list(rows_of(piece))) <= 256 for piece in made)
    assert sorted(len(piece.data) // 1_000_000 for piece in made)[-2:] == [0, 3]
