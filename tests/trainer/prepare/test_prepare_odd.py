"""What strangers feed to `prepare`: broken, odd and mixed files and rows, words that templates lose, options misspelt."""

import datetime as dt
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.mask import ChatMasker
from sftd.trainer.chat.rows import conversation
from sftd.trainer.chat.shapes import RowKeys
from sftd.trainer.tools.prepare import __main__ as prepare_main
from sftd.trainer.tools.prepare import tokenize_files, workers
from sftd.trainer.tools.prepare.sources.chat_files import open_source, pieces, rows_of
from sftd.trainer.tools.prepare.sources.dataset_folder import expand
from sftd.trainer.tools.prepare.tokenize_pieces import TokenizeOptions
from sftd.trainer.tools.protocol import EventWriter
from tests.builders.trainer.chat_templates import FAMILIES, byte_level_tokenizer, unmarked

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
ROW = {"messages": [QUESTION, ANSWER]}
QWEN = unmarked(FAMILIES["qwen2.5"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen"
    byte_level_tokenizer("qwen2.5", QWEN).save_pretrained(folder)
    return folder


def run(sources: list[Path], model: Path, out: Path, **options: Any) -> dict[str, Any]:
    made = TokenizeOptions(**options)
    return tokenize_files.tokenize_files(sources, model, out, made, EventWriter(io.StringIO()))


def read(path: Path) -> list[Any]:
    return [row for piece in pieces(open_source(path), RowKeys()) for _, row in rows_of(piece)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"tools": ["search"]}, "the field 'tools' has a text that is not JSON"),
        (ROW | {"tools": [{"type": "function", "function": "f"}]}, "'tools' must be a list of objects"),
        (ROW | {"tools": [{"name": "\ud800"}]}, "the field 'tools' is not valid Unicode"),
        (ROW | {"system": "\ud800"}, "the field 'system' is not valid Unicode"),
        (ROW | {"system": [1]}, "the field 'system' is a list, not a text"),
        ({"instruction": "q", "output": "a", "history": 5}, "the history must be a list of pairs"),
    ],
)
def test_odd_fields_beside_the_chat_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        conversation(row)


def test_a_call_in_openais_older_form_is_a_call() -> None:
    call = {"role": "assistant", "content": "Wait.", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    asked = conversation({"messages": [QUESTION, call, {"role": "function", "content": "2"}, ANSWER]})
    assert asked.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert "function_call" not in asked.messages[1]


def test_columns_may_hold_what_json_does_not(model: Path, tmp_path: Path) -> None:
    at = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    table = pa.Table.from_pylist([{"talk": [QUESTION, ANSWER | {"timestamp": at}]}])
    pq.write_table(table, tmp_path / "c.parquet")
    assert run([tmp_path / "c.parquet"], model, tmp_path / "t.parquet", messages_key="talk")["rows"] == 1


def test_a_named_field_is_never_another(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW))
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "c.parquet")
    for name in ("c.jsonl", "c.parquet"):
        with pytest.raises(PrepareError, match=r"no field 'mesages' .*; it has the fields messages"):
            run([tmp_path / name], model, tmp_path / "t.parquet", messages_key="mesages")


def test_a_byte_order_mark_and_carriage_returns_change_nothing(tmp_path: Path) -> None:
    line = json.dumps(ROW).encode() + b"\r\n"
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + line * 2)
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf\r\n[" + line + b"," + line + b"]\r\n")
    assert read(tmp_path / "c.jsonl") == read(tmp_path / "c.json") == [ROW, ROW]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"x": "\xff"}]', r"a.json, row 1 is not JSON \(invalid start byte"),
        ("b.json", b'[{"x": 1}] [{"x": 2}]', r"b.json, row 2 is not JSON \(something follows the end"),
        ("c.json", b"[" * 200_000, r"c.json, row 1 is not JSON \(maximum recursion"),
        ("d.arrow", b"", r"d.arrow is not an Arrow file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PrepareError, match=message):
        read(tmp_path / name)


def test_half_a_file_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([ROW] * 300)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) // 2])
    pq.write_table(table, tmp_path / "b.parquet")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    data[20:60] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(data)
    for name in ("a.arrow", "b.parquet"):
        with pytest.raises(PrepareError, match=f"{name} is broken"):
            read(tmp_path / name)


def test_a_folder_is_not_a_file_to_write(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(PrepareError, match=r"is a folder. Name the file to write, such as .*/train.parquet"):
        run([tmp_path / "c.jsonl"], model, tmp_path)


def test_a_split_is_not_validated_on_itself(model: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(PrepareError, match="'train' is trained on and validated on"):
        run(
            [tmp_path / "set"],
            model,
            tmp_path / "t.parquet",
            val_split="train",
            val_out=tmp_path / "v.parquet",
        )


def test_what_was_dropped_is_told_with_its_reason(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(
        PrepareError, match=r"1 rows were dropped, at .* 2 tokens \(no trained token is left\)"
    ):
        run([tmp_path / "c.jsonl"], model, tmp_path / "t.parquet", max_length=2)


def test_template_arguments_mean_what_they_say(model: Path, tmp_path: Path) -> None:
    assert [prepare_main._template_arg(f"x={value}") for value in ("False", "false", "low", "2")] == [
        ("x", False),
        ("x", False),
        ("x", "low"),
        ("x", 2),
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW))
    for name, said in (
        ("enable_thinkng", "has no variable 'enable_thinkng'"),
        # Only the beginning of one that it has, and a field of a message.
        ("add_gen", "has no variable 'add_gen'"),
        ("content", "has no variable 'content'"),
        ("add_generation_prompt", "sets the template's variable 'add_generation_prompt' itself"),
    ):
        with pytest.raises(PrepareError, match=said):
            run([tmp_path / "c.jsonl"], model, tmp_path / "t.parquet", template_args={name: False})


def test_a_column_that_is_there_twice_is_refused(model: Path, tmp_path: Path) -> None:
    column = pa.array([ROW["messages"]])
    twice = pa.Table.from_arrays([column, column], names=["messages", "messages"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(PrepareError, match="has the column 'messages' 2 times"):
        run([tmp_path / "c.parquet"], model, tmp_path / "t.parquet")


def test_a_label_that_nothing_predicts_is_not_counted_as_trained(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"messages": [QUESTION, ANSWER | {"content": "word " * 50}]})
    )
    out = tmp_path / "t.parquet"
    done = run([tmp_path / "c.jsonl"], model, out, max_length=8, truncation="left")
    labels = pq.read_table(out)["labels"].to_pylist()[0]
    assert labels[0] != -100
    assert done["trained_tokens"] == sum(label != -100 for label in labels[1:])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_message_that_is_left_out_is_missed_whatever_else_holds_its_words(family: str) -> None:
    """A tool's result comes again in the answer, so its words alone prove nothing."""
    chat = [
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"n": 2}}}],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    asked = [chat[0], ANSWER, QUESTION | {"content": "a"}, ANSWER]
    template = unmarked(FAMILIES[family])
    ChatMasker(byte_level_tokenizer(family, template)).render(asked)
    loses = "{% set messages = messages[:2] + messages[3:] %}" + template
    with pytest.raises(
        ChatError, match=r"leaves out or changes message 3|refuses it|leaves out the tool calls"
    ):
        ChatMasker(byte_level_tokenizer(family, loses)).render(chat)
    only_calls = template.replace("messages", "kept")
    loses = "{% set kept = messages | rejectattr('role', 'equalto', 'tool') | list %}" + only_calls
    with pytest.raises(ChatError, match=r"leaves out or changes message 3|leaves out the tool calls"):
        ChatMasker(byte_level_tokenizer(family, loses)).render(chat)


def test_many_small_files_have_one_set_of_workers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for source in sources:
        source.write_text(json.dumps(ROW))
    calls = []

    def tokenized(parts: Any, *rest: Any) -> Any:
        calls.append(rest[-1])
        return workers.tokenized(parts, *rest)

    monkeypatch.setattr(tokenize_files, "tokenized", tokenized)
    assert run(sources, model, tmp_path / "t.parquet")["rows"] == 3
    assert calls == [1]


def test_splits_of_the_hub_have_their_own_names(tmp_path: Path) -> None:
    for name in ("train_sft", "train_gen", "test_sft"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}-00000-of-00001.jsonl").write_text("")
    assert [file.path.name for file in expand([tmp_path], "train_sft")[0]] == [
        "train_sft-00000-of-00001.jsonl"
    ]
    with pytest.raises(PrepareError, match="no split 'train'; it has test_sft, train_gen, train_sft"):
        expand([tmp_path], "train")
