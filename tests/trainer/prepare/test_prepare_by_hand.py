"""`sftd prepare` against rows that are written out by hand: every character of a file of all shapes, and whether it is trained.

Nothing here asks sftd or transformers what a chat looks like: the expected text is the template's, written down.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.tokenizer import stop_token_ids
from sftd.trainer.tools.prepare.tokenize_files import TokenizeOptions, tokenize_files
from sftd.trainer.tools.protocol import EventWriter
from tests.builders.trainer.chat_templates import QWEN25, byte_level_tokenizer, unmarked

Piece = tuple[str, bool]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def said(role: str, text: str, *, trained: bool = False) -> list[Piece]:
    """A turn: its header, its text with the stop token, and the newline that the template puts after it."""
    return [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", trained), ("\n", False)]


SYSTEM = said("system", "You help.")
# Row → the characters of its chat, and whether the model is trained to write them.
ROWS: list[tuple[dict[str, Any], list[Piece]]] = [
    (
        {
            "messages": [
                {"role": "system", "content": "Rules"},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "No", "weight": 0},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "Yes", "weight": 1},
            ]
        },
        [
            *said("system", "Rules"),
            *said("user", "One?"),
            *said("assistant", "No"),
            *said("user", "Two?"),
            *said("assistant", "Yes", trained=True),
        ],
    ),
    (
        {"conversations": [{"from": "human", "value": "Hé?"}, {"from": "gpt", "value": "Hö"}]},
        [*SYSTEM, *said("user", "Hé?"), *said("assistant", "Hö", trained=True)],
    ),
    (
        {"prompt": "Same?", "completion": "Same", "id": 7},
        [*SYSTEM, *said("user", "Same?"), *said("assistant", "Same", trained=True)],
    ),
    (
        {
            "instruction": "Sum",
            "input": "1 2",
            "output": "3",
            "history": [["Old?", "Old"]],
            "system": "Count",
        },
        [
            *said("system", "Count"),
            *said("user", "Old?"),
            *said("assistant", "Old", trained=True),
            *said("user", "Sum\n\n1 2"),
            *said("assistant", "3", trained=True),
        ],
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "In"}, {"type": "text", "text": "two"}],
                },
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "21"},
                {"role": "assistant", "content": "Warm"},
            ],
            "tools": [TOOL],
        },
        [
            *said(
                "system",
                'You help.\n\n# Tools\n<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>',
            ),
            *said("user", "Intwo"),
            *said(
                "assistant",
                '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
                trained=True,
            ),
            *said("user", "<tool_response>\n21\n</tool_response>"),
            *said("assistant", "Warm", trained=True),
        ],
    ),
    # The third row again, in another shape.
    (
        {"messages": [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "Same"}]},
        [*SYSTEM, *said("user", "Same?"), *said("assistant", "Same", trained=True)],
    ),
]
NOT_TRAINED = {"prompt": "x", "completion": "y", "train": False}
BAD = {"messages": [{"role": "user", "content": "alone"}]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer("qwen2.5", unmarked(QWEN25))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(source: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return tokenize_files([source], model, out, TokenizeOptions(**options), EventWriter(io.StringIO()))


def characters(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[Piece]:
    """The bytes of a row's tokens, each with whether it is trained. Labels are those of their own token."""
    found: list[Piece] = []
    for id_, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, id_)
        text = tokenizer.convert_ids_to_tokens(id_)
        found += [(char, label != -100) for char in text]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    return found


def expected(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> list[Piece]:
    """The same of pieces, in the characters that a byte-level vocabulary has for bytes."""
    found: list[Piece] = []
    for text, trained in pieces:
        tokens = tokenizer.tokenize(text)
        found += [(char, trained) for token in tokens for char in token]
    return found


def test_every_character_is_the_templates_and_only_answers_are_trained(
    tokenizer: PreTrainedTokenizerFast, model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "chats.jsonl", [*(row for row, _ in ROWS), NOT_TRAINED, BAD, BAD])
    done = prepare(source, model, tmp_path / "out.parquet", skip_bad_rows=True)
    rows = pq.read_table(done["path"]).to_pylist()
    assert len(rows) == len(ROWS), "in the order of the file"
    for row, (_, pieces) in zip(rows, ROWS, strict=True):
        assert characters(tokenizer, row) == expected(tokenizer, pieces)

    # Summary and card count what is in the file.
    lengths = [len(row["input_ids"]) for row in rows]
    trained = [sum(label != -100 for label in row["labels"]) for row in rows]
    counted = {name: done[name] for name in ("rows", "tokens", "trained_tokens", "max_length")}
    assert counted == {
        "rows": 6,
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "max_length": max(lengths),
    }
    assert (done["truncated"], done["dropped"], done["rejected"]) == (0, 1, 2)
    assert done["stop_token"] == "<|im_end|>"
    assert done["sha256"] == hashlib.sha256(Path(done["path"]).read_bytes()).hexdigest()
    card = json.loads(Path(done["card"]).read_text())
    assert card["sources"] == [
        {
            "name": "chats.jsonl",
            "split": "train",
            "rows": 9,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
    assert card["shapes"] == {
        "messages": 3,
        "conversations": 1,
        "prompt+completion": 1,
        "instruction+output": 1,
    }
    assert (card["chats"]["duplicates"], card["chats"]["used"]) == (1, 6)
    assert card["chats"]["dropped_by_reason"] == {"the row is marked as not trained": 1}
    assert [example["place"] for example in card["chats"]["rejected_first"]] == [
        "chats.jsonl, line 8",
        "chats.jsonl, line 9",
    ]
    made = card["outputs"]["train"]
    assert (made["rows"], made["longest"], made["sha256"]) == (6, max(lengths), done["sha256"])
    assert sum(made["rows_by_length_up_to"].values()) == 6
    assert (made["truncated"], made["cut_tokens"], made["cut_trained_tokens"]) == (0, 0, 0)


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_a_chat_is_cut_at_its_length_and_not_before(
    tokenizer: PreTrainedTokenizerFast, model: Path, tmp_path: Path, truncation: str
) -> None:
    source = write(tmp_path / "chats.jsonl", [ROWS[0][0]])
    whole = pq.read_table(prepare(source, model, tmp_path / "whole.parquet")["path"]).to_pylist()[0]
    length = len(whole["input_ids"])
    for limit, cut in ((length, 0), (length - 1, 1), (length - 2, 2)):
        done = prepare(source, model, tmp_path / "cut.parquet", max_length=limit, truncation=truncation)
        (row,) = pq.read_table(done["path"]).to_pylist()
        kept = slice(limit) if truncation == "right" else slice(length - limit, None)
        assert (row["input_ids"], row["labels"]) == (whole["input_ids"][kept], whole["labels"][kept])
        made = json.loads(Path(done["card"]).read_text())["outputs"]["train"]
        # At the right end are the stop token and the newline after it, which is not trained.
        lost = 1 if cut == 2 and truncation == "right" else 0
        assert (done["truncated"], made["cut_tokens"], made["cut_trained_tokens"]) == (cut > 0, cut, lost)


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_a_chat_of_just_the_length_is_neither_dropped_nor_refused(
    model: Path, tmp_path: Path, truncation: str
) -> None:
    source = write(tmp_path / "chats.jsonl", [ROWS[0][0], ROWS[1][0]])
    longest = prepare(source, model, tmp_path / "whole.parquet")["max_length"]
    out = tmp_path / "out.parquet"
    just = prepare(source, model, out, max_length=longest, truncation=truncation)
    assert (just["rows"], just["dropped"], just["max_length"]) == (2, 0, longest)
    if truncation == "error":
        with pytest.raises(PrepareError, match=rf"line 1: the chat has {longest} tokens"):
            prepare(source, model, out, max_length=longest - 1, truncation=truncation)
    else:
        less = prepare(source, model, out, max_length=longest - 1, truncation=truncation)
        assert (less["rows"], less["dropped"]) == (1, 1)


def test_a_chat_of_which_only_the_first_token_is_trained_is_no_row(model: Path, tmp_path: Path) -> None:
    """Nothing predicts the first token of a row."""
    chats = [ROWS[1][0], {"prompt": "q", "completion": "z"}]
    source = write(tmp_path / "chats.jsonl", chats)
    # Left are the stop token and the newline after it.
    done = prepare(source, model, tmp_path / "out.parquet", max_length=3, truncation="left")
    assert (done["rows"], done["dropped"], done["trained_tokens"]) == (2, 0, 2)
    with pytest.raises(PrepareError, match="no trained token is left"):
        prepare(source, model, tmp_path / "none.parquet", max_length=2, truncation="left")


def test_a_chat_is_on_one_side_of_the_split_whatever_its_shape_and_blanks(
    tokenizer: PreTrainedTokenizerFast, model: Path, tmp_path: Path
) -> None:
    def blank(number: int) -> dict[str, Any]:
        turns = [{"from": "human", "value": f" q{number} "}, {"from": "gpt", "value": "x "}]
        return {"conversations": turns}

    chats = [*({"prompt": f"q{n}", "completion": "x"} for n in range(40)), *map(blank, range(40))]
    source = write(tmp_path / "chats.jsonl", chats)
    ways: list[dict[str, Any]] = [{"val_fraction": 0.3}, {"val_rows": 20}]
    for way in ways:
        done = prepare(source, model, tmp_path / "t.parquet", val_out=tmp_path / "v.parquet", **way)
        train, val = (
            [
                re.findall(r"user\n ?(q\d+)", str(tokenizer.decode(row["input_ids"])))[0]
                for row in pq.read_table(tmp_path / name).to_pylist()
            ]
            for name in ("t.parquet", "v.parquet")
        )
        assert (len(train), len(val)) == (done["rows"], done["val"]["rows"])
        assert sorted(train + val) == sorted(f"q{n}" for n in range(40) for _ in range(2))
        assert 10 <= len(val) <= 40
        assert not set(train) & set(val)


def test_each_row_is_rendered_with_its_own_variables_before_those_of_the_command(tmp_path: Path) -> None:
    template = unmarked(QWEN25).replace("'You help.'", "'Be ' + (tone | default('plain'))")
    tokenizer = byte_level_tokenizer("qwen2.5", template)
    tokenizer.save_pretrained(tmp_path / "model")
    own: list[dict[str, Any]] = [{}, {"tone": "loud"}, {"tone": "shy"}, {}]
    chats = [{"prompt": "q", "completion": "x", "chat_template_kwargs": given} for given in own]
    source = write(tmp_path / "chats.jsonl", chats)
    for options, tones in (
        ({}, ["plain", "loud", "shy", "plain"]),
        ({"template_args": {"tone": "kind"}}, ["kind", "loud", "shy", "kind"]),
    ):
        done = prepare(source, tmp_path / "model", tmp_path / "out.parquet", **options)
        for row, tone in zip(pq.read_table(done["path"]).to_pylist(), tones, strict=True):
            turns = [
                *said("system", f"Be {tone}"),
                *said("user", "q"),
                *said("assistant", "x", trained=True),
            ]
            assert characters(tokenizer, row) == expected(tokenizer, turns)


@pytest.mark.parametrize(("named", "more"), [(None, set()), (5, {5}), ([5, 6], {5, 6})])
def test_an_answer_ends_at_the_tokens_of_the_generation_config_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, named: Any, more: set[int]
) -> None:
    assert stop_token_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert stop_token_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id, *more}


def test_what_decides_the_tokens_decides_the_digests(
    tokenizer: PreTrainedTokenizerFast, model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "chats.jsonl", [row for row, _ in ROWS])
    done = prepare(source, model, tmp_path / "1.parquet")
    again = prepare(source, model, tmp_path / "2.parquet", workers=1)
    assert (done["sha256"], done["tokenizer_digest"]) == (again["sha256"], again["tokenizer_digest"])
    other = byte_level_tokenizer("qwen2.5", unmarked(QWEN25))
    other.add_tokens(["Rules"])
    other.save_pretrained(tmp_path / "other")
    differs = prepare(source, tmp_path / "other", tmp_path / "3.parquet")
    assert differs["tokenizer_digest"] != done["tokenizer_digest"]
    assert differs["sha256"] != done["sha256"]
