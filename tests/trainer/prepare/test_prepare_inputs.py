"""What `prepare` reads: every shape of row, every kind of file and folder; splits, the card, rows left out, workers."""

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.rows import conversation
from sftd.trainer.chat.shapes import RowKeys
from sftd.trainer.tools.prepare import row_file, tokenize_files
from sftd.trainer.tools.prepare.sources import chat_files, json_text
from sftd.trainer.tools.prepare.sources.chat_files import Piece, open_source, pieces, rows_of
from sftd.trainer.tools.prepare.sources.dataset_folder import expand
from sftd.trainer.tools.prepare.splitting import SmallestKeys
from sftd.trainer.tools.prepare.tokenize_pieces import TokenizeOptions
from sftd.trainer.tools.protocol import EventWriter
from tests.builders.trainer.chat_templates import FAMILIES, byte_level_tokenizer, unmarked

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
        (
            {"messages": [{"role": "human", "content": [{"type": "input_text", "text": "q"}]}, *ANSWER]},
            "messages",
        ),
        ({"conversation": [{"role": "User", "text": "q"}, {"role": "AI", "value": "a"}]}, "conversation"),
        ({"messages": str(QUESTION + ANSWER)}, "messages"),
    ],
)
def test_a_chat_is_the_same_in_every_shape(row: dict[str, Any], shape: str) -> None:
    chat = conversation(row)
    assert (chat.messages, chat.tools, chat.shape) == (QUESTION + ANSWER, None, shape)
    assert chat.key() == conversation({"messages": QUESTION + ANSWER}).key()
    with_system = conversation(row | {"system": "s"})
    assert with_system.messages == [{"role": "system", "content": "s"}, *QUESTION, *ANSWER]


def test_alpacas_input_and_history_are_part_of_the_chat() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}
    contents = [message["content"] for message in conversation(row).messages]
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
    field = "functions" if "from" in call else "tools"
    chat = conversation({"messages": [*QUESTION, call, result, *ANSWER], field: json.dumps([CALL])})
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
        ({"messages": [*QUESTION, {**ANSWER[0], "weight": -1}]}, "message 2 has the weight -1; it must be"),
        ({"messages": QUESTION + ANSWER, "weight": "nan"}, "the row has the weight nan; it must be a number"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "tool_calls": ["f"]}]},
            "tool call of message 2 is not an obj",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "'tool_calls' of message 1 is text that is not",
        ),
        ({"messages": QUESTION + ANSWER, "tools": "{"}, "the field 'tools' is text that is not JSON"),
        ({"messages": QUESTION + ANSWER, "tools": [1]}, "must be a list of objects"),
        ({"prompt": 1, "completion": "a"}, "one is a number: each is a text or a list"),
        ({"instruction": "q", "output": 1}, "instruction and output must be texts"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        conversation(row)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"q{n}"}, *ANSWER]} for n in range(start, start + count)
    ]


def read(path: Path) -> list[Any]:
    return [row for piece in pieces(open_source(path), RowKeys()) for _, row in rows_of(piece)]


def save_arrow(path: Path, table: pa.Table, *, stream: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many pieces, and objects that lie across the blocks in which the file is read.
    monkeypatch.setattr(chat_files, "_PIECE_ROWS", 7)
    monkeypatch.setattr(json_text, "_BLOCK", 50)
    wanted = rows(40)
    table = pa.Table.from_pylist([{**row, "id": 1} for row in wanted])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    save_arrow(tmp_path / "b.arrow", table)
    save_arrow(tmp_path / "c.arrow", table, stream=False)
    (tmp_path / "d.json").write_text(json.dumps(wanted, indent=1))
    write_jsonl(tmp_path / "e.json", wanted)
    write_jsonl(tmp_path / "f.jsonl", wanted)
    write_jsonl(tmp_path / "g.JSONL", wanted)
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress((tmp_path / "f.jsonl").read_bytes()))
    (tmp_path / "i.json.bz2").write_bytes(bz2.compress((tmp_path / "d.json").read_bytes()))
    (tmp_path / "j.ndjson.xz").write_bytes(lzma.compress((tmp_path / "f.jsonl").read_bytes()))
    (tmp_path / "k.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in wanted))
    (tmp_path / "l.json").write_text("\n\n" + json.dumps(wanted))
    for name, codec in (("m.jsonl.zst", "zstd"), ("n.json.lz4", "lz4")):
        with pa.CompressedOutputStream(str(tmp_path / name), codec) as stream:
            stream.write((tmp_path / ("f.jsonl" if codec == "zstd" else "d.json")).read_bytes())
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == wanted, path
        assert open_source(path).rows == 40
        assert [p.first for p in pieces(open_source(path), RowKeys())][:2] == [1, 8]
    chats = [row["messages"] for row in wanted]
    for path in (write_jsonl(tmp_path / "o.jsonl", chats), tmp_path / "p.json"):
        (tmp_path / "p.json").write_text(json.dumps(chats))
        assert [conversation(row).messages for row in read(path)] == chats
    (tmp_path / "d.json").write_text('[{"messages": 1}, {"mess')
    with pytest.raises(PrepareError, match=r"d.json, row 2 is not JSON"):
        read(tmp_path / "d.json")


def test_csv_is_read_by_its_columns(models: dict[str, Path], tmp_path: Path) -> None:
    text = 'prompt,completion,id\n"a, ""b""\nc",x,1\n\n"p","y",2\n'
    (tmp_path / "a.csv").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.tsv").write_text('prompt\tcompletion\tid\n"a, ""b""\nc"\tx\t1\np\ty\t2\n')
    wanted = [
        {"prompt": 'a, "b"\nc', "completion": "x", "id": "1"},
        {"prompt": "p", "completion": "y", "id": "2"},
    ]
    for name in ("a.csv", "b.csv.gz", "c.tsv"):
        assert read(tmp_path / name) == wanted
        assert open_source(tmp_path / name).rows == 2
        assert prepare(tmp_path / name, models["qwen2.5"], tmp_path / "t.parquet")["rows"] == 2
    chat = json.dumps(rows(1)[0]["messages"]).replace('"', '""')
    (tmp_path / "d.csv").write_text(f'messages\n"{chat}"\n')
    assert prepare(tmp_path / "d.csv", models["qwen2.5"], tmp_path / "t.parquet")["rows"] == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"prompt,completion\nq,a,b\n", r"a.csv, row 1: it has 3 cells, but the file has 2 columns"),
        ("b.csv", b"x,y\nq,a\n", r"b.csv: there is no chat in it: it has the fields x, y"),
        ("c.csv", b'prompt,completion\n"q,a\n', r"c.csv is broken \(unexpected end of data"),
        ("d.csv", b"prompt,completion\n\xff,a\n", r"d.csv is broken \('utf-8' codec"),
        (
            "e.jsonl.gz",
            gzip.compress(b"x" * 9999, mtime=0)[:30],
            r"e.jsonl.gz is broken \(Compressed file ended",
        ),
        ("f.jsonl.gz", b"{}", r"f.jsonl.gz is broken \(Not a gzipped file"),
        ("g.jsonl.zst", b"{}", r"g.jsonl.zst is broken \(ZSTD decompress failed"),
        ("g.jsonl.zip", b"", r"g.jsonl.zip cannot be read directly: unpack it"),
        ("h.jsonl", b'{\n "a": 1,\n}\n', r"h.jsonl, row 1 is not JSON"),
    ],
)
def test_broken_files_of_the_newer_kinds_are_named(
    name: str, data: bytes, message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PrepareError, match=message):
        prepare(tmp_path / name, models["qwen2.5"], tmp_path / "t.parquet")


def test_messages_may_be_json_text() -> None:
    chat = json.dumps(QUESTION + ANSWER)
    assert conversation({"messages": chat}).messages == QUESTION + ANSWER
    assert conversation({"talk": chat}, RowKeys("talk")).messages == QUESTION + ANSWER
    with pytest.raises(ChatError, match="the field 'messages' is text that is not JSON"):
        conversation({"messages": chat[:-1]})


def test_the_fields_of_prompt_and_response_may_be_named(models: dict[str, Path], tmp_path: Path) -> None:
    keys = RowKeys(prompt="question", response="answer")
    row = {"question": "q", "answer": "a", "messages": [], "system": "s"}
    assert conversation(row, keys).messages == [{"role": "system", "content": "s"}, *QUESTION, *ANSWER]
    table = pa.Table.from_pylist([{"question": "q", "answer": "a", "id": 7}])
    pq.write_table(table, tmp_path / "a.parquet")
    options = {"prompt_key": "question", "response_key": "answer"}
    assert prepare(tmp_path / "a.parquet", models["qwen2.5"], tmp_path / "t.parquet", **options)["rows"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            r"has the fields question, answer. Accepted are messages; .* --prompt-key question --response-key answer, or",
        ),
        (
            {"x": 1},
            r"has the fields x. Accepted .* with --prompt-key and --response-key, or a list of messages with --mess",
        ),
        ({"text": "x"}, r"text without roles .* as for pretraining"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            r"preference data .* use --prompt-key prompt --response-key chosen$",
        ),
        (
            {"prompt": "q", "chosen": QUESTION + ANSWER, "rejected": QUESTION + ANSWER},
            r"preference data .* use --messages-key chosen$",
        ),
        ({"chosen": QUESTION + ANSWER, "rejected": []}, r"use --messages-key chosen$"),
    ],
)
def test_a_row_without_a_chat_is_named_for_what_it_is(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        conversation(row)


@pytest.mark.parametrize("mark", ["weight", "loss", "train", "training", "train_on_turn"])
def test_the_marks_of_other_tools_leave_an_answer_untrained(
    mark: str, models: dict[str, Path], tmp_path: Path
) -> None:
    def trained(**marks: Any) -> int:
        chat = [*QUESTION, {**ANSWER[0], "content": "word " * 9, **marks}, *QUESTION, *ANSWER]
        source = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat}])
        return int(prepare(source, models["qwen2.5"], tmp_path / "t.parquet")["trained_tokens"])

    for no, yes in ((False, True), (0, 1)):
        assert trained(**{mark: no}) < trained(**{mark: yes}) == trained()
    with pytest.raises(ChatError, match=f"message 2 has the {mark} maybe; it (can only be 0|must be a num)"):
        conversation({"messages": [*QUESTION, {**ANSWER[0], mark: "maybe"}]})
    if mark != "weight":
        with pytest.raises(ChatError, match="the marks of message 2 contradict each other"):
            conversation({"messages": [*QUESTION, {**ANSWER[0], mark: False, "weight": 1}]})


@pytest.mark.parametrize("options", [{}, {"val_rows": 2, "max_length": 130}])
def test_weights_other_than_0_and_1_have_a_column(
    options: dict[str, Any], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "_ROW_GROUP_ROWS", 2)
    turns = [{**ANSWER[0], "weight": w, "content": c} for w, c in ((0, "none"), (0.25, "some"), (1, "all"))]
    wanted = [*rows(5), {"messages": [m for a in turns for m in (*QUESTION, a)], "weight": "2"}]
    plain = prepare(write_jsonl(tmp_path / "c.jsonl", rows(5)), models["qwen2.5"], tmp_path / "t.parquet")
    assert "loss_weights" not in pq.read_schema(plain["path"]).names
    source = write_jsonl(tmp_path / "c.jsonl", wanted)
    done = prepare(source, models["qwen2.5"], tmp_path / "t.parquet", **options)
    files = [pq.read_table(one["path"]) for one in (done, done["val"]) if one]
    (table,) = (file.to_pylist() for file in files if "loss_weights" in file.column_names)
    tokenizer = AutoTokenizer.from_pretrained(models["qwen2.5"])
    found: dict[float, list[int]] = {}
    for row in table:
        for id_, label, weight in zip(row["input_ids"], row["labels"], row["loss_weights"], strict=True):
            assert (weight == 0) == (label == -100)
            found.setdefault(weight, []).append(id_)
    texts = {weight: tokenizer.decode(ids) for weight, ids in found.items() if weight}
    assert texts[0.5] == "some<|im_end|>"
    assert texts[1] == "a<|im_end|>" * (len(table) - 1)
    assert options or texts[2] == "all<|im_end|>"
    assert done["warnings"][-1].startswith("1 row with weights other than 0 and 1: the column loss_weights")
    assert sorted(path.name for path in tmp_path.glob("*.partial*")) == []


def test_what_is_not_used_is_counted_and_told(models: dict[str, Path], tmp_path: Path) -> None:
    chat = [{**QUESTION[0], "training": True}, {**ANSWER[0], "train_detail": [], "name": "Bo"}]
    wanted = [
        {"messages": chat, "id": 1, "loss_type": "a", "weight": "heavy", "loss": 0.5},
        {"messages": QUESTION + ANSWER, "id": 2},
        {"messages": QUESTION + ANSWER, "train": False},
    ]
    done = prepare(write_jsonl(tmp_path / "c.jsonl", wanted), models["qwen2.5"], tmp_path / "t.parquet")
    assert done["rows"] == 2
    card = json.loads(Path(done["card"]).read_text())
    assert card["chats"]["with_fields_not_used"] == {
        "id": 2,
        "loss of a row": 1,
        "loss_type": 1,
        "train_detail of messages": 1,
        "weight of a row": 1,
        "weight of a user message": 1,
    }
    assert card["chats"]["dropped_by_reason"] == {"the row is marked as not trained": 1}
    not_used = "loss of a row (1 chat), loss_type (1 chat), train_detail of messages (1 chat), weight of a row (1 chat), "
    assert done["warnings"] == [
        f"sftd does not use {not_used}weight of a user message (1 chat)",
        "1 row marked as not trained: left out",
    ]
    assert "| loss_type | 1 |" in Path(done["card_text"]).read_text()
    pq.write_table(pa.Table.from_pylist([{**rows(1)[0], "loss_type": "a", "id": 1}]), tmp_path / "c.parquet")
    done = prepare(tmp_path / "c.parquet", models["qwen2.5"], tmp_path / "t.parquet")
    assert done["warnings"] == ["sftd does not use loss_type (1 chat)"]


@pytest.mark.parametrize("options", [{}, {"val_split": "test"}])
def test_duplicates_are_counted(options: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    same = {"prompt": " q1", "completion": "a", "id": 9}
    write_jsonl(tmp_path / "set/train.jsonl", [*rows(3), *rows(2), same])
    write_jsonl(tmp_path / "set/test.jsonl", rows(2, start=7))
    done = prepare(tmp_path / "set", models["qwen2.5"], tmp_path / "t.parquet", **options)
    assert done["warnings"] == ["3 of 6 chats repeat another one word for word"]
    assert json.loads(Path(done["card"]).read_text())["chats"]["duplicates"] == 3


def test_a_row_may_bring_variables_of_the_template(models: dict[str, Path], tmp_path: Path) -> None:
    def ids(args: Any, **options: Any) -> list[int]:
        row = rows(1)[0] | {"chat_template_kwargs": args}
        source = write_jsonl(tmp_path / "c.jsonl", [rows(1)[0], row])
        prepare(source, models["qwen3"], tmp_path / "t.parquet", **options)
        table = pq.read_table(tmp_path / "t.parquet").to_pylist()
        return [sum(label != -100 for label in row["labels"]) for row in table]

    plain, thoughtless = ids({"enable_thinking": False})
    assert plain > thoughtless
    assert ids('{"enable_thinking": false}') == [plain, thoughtless]
    assert ids(None) == ids({"unknown": 1}) == [plain, plain]
    # The row's own come before those of the command.
    assert ids({"enable_thinking": True}, template_args={"enable_thinking": False}) == [thoughtless, plain]
    with pytest.raises(
        PrepareError, match="line 2: the field 'chat_template_kwargs' is a list, not an object"
    ):
        ids([1])


def test_nulls_are_left_out_of_tools_and_kept_in_calls() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]}
    tool = {
        "name": "f",
        "description": None,
        "parameters": {
            "properties": {
                "x": {"type": "integer", "enum": None, "default": None},
                "z": None,
                "default": None,
            }
        },
    }
    chat = conversation({"messages": [*QUESTION, call], "tools": [tool]})
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    assert chat.tools == [
        {"name": "f", "parameters": {"properties": {"x": {"type": "integer", "default": None}}}}
    ]


def test_validation_rows_have_a_file_of_their_own_by_default(models: dict[str, Path], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", rows(40))
    done = prepare(source, models["qwen2.5"], tmp_path / "train.parquet", val_rows=5)
    assert done["val"]["path"] == str(tmp_path / "train.val.parquet")
    assert done["val"]["rows"] == 5


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
    (piece,) = pieces(open_source(tmp_path / "a.parquet"), RowKeys())
    read = [conversation(row).messages[1]["tool_calls"] for _, row in rows_of(piece)]
    assert [call["function"]["arguments"] for (call,) in read] == [{"x": 1}, {"y": "2"}]


def found(sources: list[Path], split: str) -> list[Path]:
    return [file.path for file in expand(sources, split)[0]]


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
    assert found([saved], "train") == [saved / "train" / f"data-{n}.arrow" for n in (1, 0)]
    assert found([saved / "test"], "train") == found([saved], "test")
    assert [file.name for file in expand([saved], "train")[0]] == [
        "saved/train/data-1.arrow",
        "saved/train/data-0.arrow",
    ]
    with pytest.raises(PrepareError, match=r"has no split 'validation'; it has test, train. Choose"):
        expand([saved], "validation")
    (saved / "test" / "state.json").write_text('{"_data_files": [{"name": "data-0.arrow"}]}')
    with pytest.raises(PrepareError, match="names no data files"):
        expand([saved / "test"], "test")
    (saved / "test" / "state.json").write_text('{"_data_files": [], "_indices_files": ["i.arrow"]}')
    with pytest.raises(PrepareError, match=r"flatten_indices"):
        expand([saved / "test"], "test")

    (tmp_path / "empty").mkdir()
    with pytest.raises(PrepareError, match="is not a data set folder"):
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
    # What is cut off is the end of the answer, its stop token, and the newline after it.
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
    assert done["warnings"] == [
        "2 training rows with a chat that is also in the validation data; the first (from 0) in t.parquet: 8, 9"
    ]
    with pytest.raises(PrepareError, match="none of the sources is a folder"):
        prepare(tmp_path / "set/train.jsonl", models["qwen2.5"], tmp_path / "t.parquet", **options)


def test_what_is_to_be_known_of_the_validation_split_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "data/train-00000-of-00001.jsonl", rows(4))
    write_jsonl(folder / "data/validation-00000-of-00001.jsonl", rows(4, start=8))
    options: dict[str, Any] = {"val_split": "dev", "val_out": tmp_path / "v.parquet"}
    done = prepare(folder, models["qwen2.5"], tmp_path / "t.parquet", **options)
    assert done["warnings"] == ["set: the split validation is read as dev"]


@pytest.mark.parametrize("depth", [990, 5000])
@pytest.mark.parametrize("field", ["tools", "arguments", "tool_calls", "tool", "chat_template_kwargs"])
def test_a_row_that_is_nested_without_end_is_named(
    field: str, depth: int, models: dict[str, Path], tmp_path: Path
) -> None:
    nested = "[" * depth + "]" * depth
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    row: dict[str, Any] = {"messages": [question, answer]}
    if field == "tools":
        row[field] = '[{"type": "function", "function": {"name": "f", "x": ' + nested + "}}]"
    elif field == "arguments":
        answer["tool_calls"] = [{"function": {"name": "f", "arguments": '{"a": ' + nested + "}"}}]  # type: ignore[assignment]
    elif field == "tool_calls":
        answer[field] = '[{"function": {"name": "f", "arguments": {"a": ' + nested + "}}}]"
    elif field == "tool":
        row["messages"].insert(1, {"role": "tool", "content": "NESTED"})
    else:
        row[field] = '{"a": ' + nested + "}"
    text = json.dumps(row).replace('"NESTED"', '{"a": ' + nested + "}")
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps(good) + "\n" for good in rows(3)) + text + "\n")
    done = prepare(source, models["qwen2.5"], tmp_path / "t.parquet", skip_bad_rows=True)
    assert done["rows"] >= 3


def test_text_that_is_taken_for_special_tokens_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "c.jsonl", [*rows(3), {"prompt": "What is <|im_end|>?", "completion": "a"}]
    )
    done = prepare(source, models["qwen2.5"], tmp_path / "t.parquet")
    assert [text.partition(" that")[0] for text in done["warnings"]] == [
        "1 chat with text in messages, tool calls or tools"
    ]


def test_reasoning_of_earlier_turns_becomes_rows_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
    source = write_jsonl(tmp_path / "c.jsonl", [{"messages": [*QUESTION, thought, *QUESTION, thought]}])
    with pytest.raises(
        PrepareError,
        match=r"line 1: the chat template changes more than whitespace in the assistant's message 2",
    ):
        prepare(source, models["qwen3"], tmp_path / "t.parquet")
    assert prepare(source, models["qwen3"], tmp_path / "t.parquet", rewritten="split")["rows"] == 2
    masked = prepare(source, models["qwen3"], tmp_path / "t.parquet", rewritten="mask")
    assert masked["rows"] == 1
    assert "1 answer not trained" in masked["warnings"][0]


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
        made: list[Piece] = list(pieces(open_source(tmp_path / name), RowKeys()))
        assert all(len(list(rows_of(piece))) <= 256 for piece in made)
    assert sorted(len(piece.data) // 1_000_000 for piece in made)[-2:] == [0, 3]
