"""Chat templates that open the reasoning, want arguments as text, have names, or ask for the date; and tokenizers that add
tokens or lose characters."""

import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftd.domain.data.chat_template import DEFAULT_DATE, ChatTemplate
from sftd.domain.data.rows import IGNORE_INDEX
from sftd.domain.spec.spec import Spec
from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.mask import ChatMasker
from sftd.trainer.chat.render import RenderedChat, Rewritten
from sftd.trainer.chat.rows import conversation
from sftd.trainer.chat.template import BoundTemplate
from sftd.trainer.tools.prepare import __main__ as prepare_main
from sftd.trainer.tools.prepare.show_row import show_row
from sftd.trainer.tools.prepare.tokenize_files import TokenizeOptions, tokenize_files
from sftd.trainer.tools.protocol import EventWriter
from sftd.wire.data.chat_template import METADATA_KEY
from tests.builders.trainer.chat_templates import (
    FAMILIES,
    LLAMA3,
    QWEN25,
    SMOLLM2,
    THINKING,
    THINKING_IN_CONTENT,
    THINKING_NEVER_SHOWN,
    byte_level_tokenizer,
    unmarked,
)

QUESTION = {"role": "user", "content": "1+1?"}
AGAIN = {"role": "user", "content": "2+2?"}
INLINE = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"}
IN_FIELD = {"role": "assistant", "reasoning_content": "Easy.", "content": "2"}
UNOPENED = {"role": "assistant", "content": "Easy.\n</think>\n\n2"}
PLAIN = {"role": "assistant", "content": "2"}
WRITTEN = "Easy.\n</think>\n\n2"
OPENING = {
    "thinking": ("qwen3", THINKING),
    "in content": ("qwen3", THINKING_IN_CONTENT),
    "never shown": ("deepseek", THINKING_NEVER_SHOWN),
}
CLOCK = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + unmarked(SMOLLM2)


def masker_of(kind: str) -> ChatMasker:
    return ChatMasker(byte_level_tokenizer(*OPENING[kind]))


def answers(rows: list[RenderedChat]) -> list[list[str]]:
    return [[row.text[start:end] for start, end in row.answers] for row in rows]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(source: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return tokenize_files([source], model, out, TokenizeOptions(**options), EventWriter(io.StringIO()))


def texts_of(path: Path, model: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [str(tokenizer.decode(ids)) for ids in pq.read_table(path)["input_ids"].to_pylist()]


def card_of(done: dict[str, Any]) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(Path(done["card"]).read_text())
    return card


# Reasoning whose opening tag is in the generation prompt.


@pytest.mark.parametrize("kind", list(OPENING))
@pytest.mark.parametrize("answer", [INLINE, IN_FIELD, UNOPENED, INLINE | {"reasoning_content": "Easy."}])
@pytest.mark.parametrize("rewritten", ["refuse", "mask", "split"])
def test_what_follows_the_opening_tag_of_the_prompt_is_trained(
    kind: str, answer: dict[str, Any], rewritten: Rewritten
) -> None:
    masker = masker_of(kind)
    (row,) = masker.rows([QUESTION, answer], None, rewritten)
    prompt = masker.template.render([QUESTION], add_generation_prompt=True)
    ((start, end),) = row.answers
    assert (row.text[:start], row.text[start:end]) == (prompt, WRITTEN)
    (masked,) = masker.encode([row])
    assert masked.unstopped == 0
    assert (row.as_shown, row.rewritten) == (0, 0)


@pytest.mark.parametrize("kind", list(OPENING))
@pytest.mark.parametrize("answer", [INLINE, IN_FIELD])
def test_reasoning_cut_out_of_earlier_answers_is_refused_masked_or_split(
    kind: str, answer: dict[str, Any]
) -> None:
    masker, chat = masker_of(kind), [QUESTION, answer, AGAIN, answer]
    with pytest.raises(ChatError, match=r"message 2 .*--rewritten split"):
        masker.rows(chat)
    (masked,) = masker.rows(chat, None, "mask")
    assert (answers([masked]), masked.rewritten) == ([[WRITTEN]], 1)
    split = masker.rows(chat, None, "split")
    assert answers(split) == [[WRITTEN], [WRITTEN]]
    for row, upto in zip(split, (1, 3), strict=True):
        prompt = masker.template.render(chat[:upto], add_generation_prompt=True)
        assert row.text.startswith(prompt + WRITTEN)


def test_a_plain_answer_that_the_template_gives_an_empty_block_is_trained_with_it() -> None:
    masker, chat = masker_of("thinking"), [QUESTION, PLAIN, AGAIN, PLAIN]
    (row,) = masker.rows(chat)
    # Later turns see the first answer without the block: trained as shown, and counted.
    assert (answers([row]), row.as_shown) == ([["2", "\n</think>\n\n2"]], 1)
    assert answers(masker.rows(chat, None, "split")) == [["\n</think>\n\n2"], ["\n</think>\n\n2"]]


@pytest.mark.parametrize("kind", ["in content", "never shown"])
def test_a_plain_answer_behind_opened_reasoning_is_shown_or_explained(kind: str) -> None:
    masker = masker_of(kind)
    (row,) = masker.rows([QUESTION, PLAIN])
    assert (answers([row]), row.as_shown) == ([["2"]], 1)
    with pytest.raises(
        ChatError, match=r"opens reasoning \(<think>\), but .* message 2 has none.*without --rew"
    ):
        masker.rows([QUESTION, PLAIN], None, "split")


def test_reasoning_behind_a_marked_block_is_not_taken_for_lost() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n' }}"
        "{% generation %}{{ m.content.removeprefix('<think>\n') + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    (row,) = ChatMasker(byte_level_tokenizer("qwen3", template)).rows([QUESTION, INLINE])
    assert answers([row]) == [[WRITTEN + "<|im_end|>"]]


# Arguments of tool calls, as objects and as text.

GIVEN = '{"city":  "Rome"}'


def call_row(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": [*messages, {"role": "tool", "content": "21"}, PLAIN]}


CONCATENATES = ("deepseek", THINKING_NEVER_SHOWN)
PRINTS = (
    "qwen2.5",
    unmarked(QWEN25).replace("' + c.function.arguments | tojson + '", "' ~ c.function.arguments ~ '"),
)
ITERATES = (
    "qwen2.5",
    unmarked(QWEN25).replace(
        "' + c.function.arguments | tojson + '",
        "' }}{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}{% endfor %}{{ '",
    ),
)


@pytest.mark.parametrize(
    ("template", "arguments", "shown", "form"),
    [
        (CONCATENATES, GIVEN, GIVEN, "text"),
        (CONCATENATES, {"city": "Rome"}, '{"city": "Rome"}', "text"),
        (PRINTS, GIVEN, GIVEN, "text"),
        (PRINTS, {"city": "Rome"}, '{"city": "Rome"}', "text"),
        (ITERATES, GIVEN, "city=Rome", "object"),
        (ITERATES, {"city": "Rome"}, "city=Rome", "object"),
        (("qwen2.5", unmarked(QWEN25)), GIVEN, '{"city": "Rome"}', "object"),
    ],
)
def test_arguments_are_given_in_the_form_that_the_template_takes(
    template: tuple[str, str], arguments: Any, shown: str, form: str
) -> None:
    tokenizer = byte_level_tokenizer(*template)
    row = call_row(arguments)
    chat = conversation(row, None)
    (rendered,) = ChatMasker(tokenizer).rows(chat.messages, None, "mask")
    assert rendered.arguments == form
    assert shown in rendered.text
    assert shown in answers([rendered])[0][0]
    if isinstance(arguments, str) and form == "text":
        # transformers itself renders the row as it is.
        assert rendered.text == tokenizer.apply_chat_template(row["messages"], tokenize=False)


def test_the_form_of_arguments_does_not_change_a_chats_place_in_a_split() -> None:
    assert conversation(call_row(GIVEN), None).key() == conversation(call_row({"city": "Rome"}), None).key()


def test_an_error_that_both_forms_have_is_the_first() -> None:
    template = unmarked(QWEN25).replace("c.function.arguments | tojson", "'{}'")
    masker = ChatMasker(byte_level_tokenizer("qwen2.5", template))
    with pytest.raises(ChatError, match=r"leaves out the tool calls of the assistant's message 2"):
        masker.rows(conversation(call_row(GIVEN), None).messages)


# Several named templates.


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A model folder with a default template and one for tools."""
    tokenizer: Any = byte_level_tokenizer("qwen2.5", "")
    tokenizer.chat_template = {
        "default": unmarked(SMOLLM2),
        "tool_use": unmarked(QWEN25),
        "short": unmarked(SMOLLM2).replace("Be of help.", "Short."),
    }
    tokenizer.save_pretrained(tmp_path / "named")
    assert (tmp_path / "named/additional_chat_templates/tool_use.jinja").is_file()
    return tmp_path / "named"


TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}


@pytest.mark.parametrize("is_list", [False, True])
def test_named_templates_are_chosen_as_transformers_does(named: Path, tmp_path: Path, is_list: bool) -> None:
    if is_list:  # the older form: a list in tokenizer_config.json
        (named / "chat_template.jinja").unlink()
        shutil.rmtree(named / "additional_chat_templates")
        config = json.loads((named / "tokenizer_config.json").read_text())
        templates = {"default": unmarked(SMOLLM2), "tool_use": unmarked(QWEN25)}
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (named / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"messages": [QUESTION, PLAIN]}, call_row({"city": "Rome"}) | {"tools": [TOOL]}]
    done = prepare(write_rows(tmp_path / "c.jsonl", rows), named, tmp_path / "t.parquet")
    tokenizer: Any = AutoTokenizer.from_pretrained(named)
    assert texts_of(tmp_path / "t.parquet", named) == [
        tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False) for row in rows
    ]
    card = card_of(done)["chat_template"]
    assert card["chats_by_name"] == {"default": 1, "tool_use": 1}
    assert card["tool_arguments"] == {"object": 1}


def test_a_template_is_chosen_by_its_name(named: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "c.jsonl", [{"messages": [QUESTION, PLAIN]}])
    done = prepare(source, named, tmp_path / "t.parquet", template_name="short")
    assert "Short." in texts_of(tmp_path / "t.parquet", named)[0]
    assert card_of(done)["chat_template"]["chats_by_name"] == {"short": 1}
    with pytest.raises(PrepareError, match=r"no chat template named 'long'; it has default, short, tool_use"):
        prepare(source, named, tmp_path / "t.parquet", template_name="long")
    (named / "chat_template.jinja").unlink()
    with pytest.raises(
        PrepareError, match=r"names short, tool_use, and none is the default.*--template NAME"
    ):
        prepare(source, named, tmp_path / "t.parquet")


# A template of one's own, and none at all.


def test_a_base_model_takes_a_template_from_a_file(tmp_path: Path) -> None:
    tokenizer: Any = byte_level_tokenizer("qwen2.5", "")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    source = write_rows(tmp_path / "c.jsonl", [{"messages": [QUESTION, PLAIN]}])
    with pytest.raises(PrepareError, match=r"no chat template, as is usual for base models.*--chat-template"):
        prepare(source, tmp_path / "base", tmp_path / "t.parquet")
    template = tmp_path / "chat.jinja"
    template.write_text(unmarked(SMOLLM2))
    text = prepare_main._template_text(template)
    prepare(source, tmp_path / "base", tmp_path / "t.parquet", template_text=text)
    assert "Be of help." in texts_of(tmp_path / "t.parquet", tmp_path / "base")[0]
    metadata = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[METADATA_KEY])
    assert metadata["chat_template"]["text"] == unmarked(SMOLLM2)
    assert show_row(tmp_path / "t.parquet", tmp_path / "base", 0)["trained"] > 0
    with pytest.raises(PrepareError, match=r"none\.jinja cannot be read: No such file"):
        prepare_main._template_text(tmp_path / "none.jinja")
    (tmp_path / "c.txt").write_text("Hello")
    with pytest.raises(PrepareError, match=r"c\.txt is not a chat template"):
        prepare_main._template_text(tmp_path / "c.txt")


def test_a_folder_without_a_tokenizer_is_not_one_without_a_template(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen2"}')
    source = write_rows(tmp_path / "c.jsonl", [{"messages": [QUESTION, PLAIN]}])
    with pytest.raises(PrepareError, match=r"has no tokenizer: neither tokenizer\.json"):
        prepare(source, tmp_path / "model", tmp_path / "t.parquet")


# The current date.


def test_the_current_date_is_a_recorded_one(tmp_path: Path) -> None:
    byte_level_tokenizer("smollm2", CLOCK).save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "c.jsonl", [{"messages": [QUESTION, PLAIN]}])
    done = prepare(source, tmp_path / "model", tmp_path / "t.parquet")
    assert texts_of(tmp_path / "t.parquet", tmp_path / "model")[0].startswith("Today is 26 Jul 2024.")
    assert card_of(done)["chat_template"]["date"] == DEFAULT_DATE
    assert [w for w in done["warnings"] if "current date" in w and DEFAULT_DATE in w]
    byte_level_tokenizer("smollm2", unmarked(SMOLLM2)).save_pretrained(tmp_path / "timeless")
    with pytest.raises(PrepareError, match="does not use the current date, so --date has no effect"):
        prepare(source, tmp_path / "timeless", tmp_path / "u.parquet", date="2025-02-03")
    done = prepare(source, tmp_path / "model", tmp_path / "u.parquet", date="2025-02-03")
    assert texts_of(tmp_path / "u.parquet", tmp_path / "model")[0].startswith("Today is 03 Feb 2025.")
    assert card_of(done)["chat_template"]["date"] == "2025-02-03"


def test_two_renderers_of_one_process_have_their_own_dates() -> None:
    tokenizer = byte_level_tokenizer("smollm2", CLOCK)
    first, second = (
        BoundTemplate(tokenizer, ChatTemplate(date=date)) for date in ("2025-01-01", "2026-01-01")
    )
    assert [each.render([QUESTION])[:20] for each in (first, second, first)] == [
        "Today is 01 Jan 2025",
        "Today is 01 Jan 2026",
        "Today is 01 Jan 2025",
    ]


def test_a_date_that_is_none_is_refused() -> None:
    assert prepare_main._date("20250203") == "2025-02-03"
    with pytest.raises(PrepareError, match="--date 3 Feb is not a date such as 2024-07-26"):
        prepare_main._date("3 Feb")


# What the tokenizer does by itself.


def adding_bos(family: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with its BOS."""
    tokenizer = byte_level_tokenizer(family, template)
    bos = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_template_alone_writes_the_beginning_of_sequence(family: str) -> None:
    tokenizer = adding_bos(family, unmarked(FAMILIES[family]))
    chat = [QUESTION, PLAIN]
    masker = ChatMasker(tokenizer)
    (masked,) = masker.encode(masker.rows(chat))
    assert masked.input_ids == tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    prompt: Any = tokenizer.apply_chat_template([QUESTION], tokenize=True, add_generation_prompt=True)
    assert BoundTemplate(tokenizer).prompt_ids("1+1?") == prompt["input_ids"]


def test_sample_prompts_begin_once_and_are_rendered_as_the_data_was(tmp_path: Path) -> None:
    """What the model is asked, against transformers: one BOS, the data's date and its variables."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core misses NVIDIA's kernels
        from sftd.trainer.errors import UserError
        from sftd.trainer.loop.generate import Generator

    template = "{{ bos_token }}{% if loud %}{{ 'Loud. ' }}{% endif %}" + CLOCK
    tokenizer = adding_bos("smollm2", template)
    tokenizer.save_pretrained(tmp_path / "model")
    sections = {
        "model": {"partial_pretrain": str(tmp_path / "model")},
        "trainer": {"sample_prompts": ["1+1?"]},
    }
    spec = msgspec.convert(sections, Spec)

    def asked(chosen: ChatTemplate | None) -> str:
        made: Any = Generator(spec, len(tokenizer), chosen)
        return str(tokenizer.decode(made._ids["1+1?"]))

    bos = tokenizer.bos_token
    shown: Any = tokenizer.apply_chat_template([QUESTION], tokenize=True, add_generation_prompt=True)
    _, _, rest = str(tokenizer.decode(shown["input_ids"])).partition(".\n")
    assert asked(None) == f"{bos}Today is 26 Jul 2024.\n{rest}"
    chosen = ChatTemplate(date="2025-02-03", arguments={"loud": True})
    assert asked(chosen) == f"{bos}Loud. Today is 03 Feb 2025.\n{rest}"
    assert asked(ChatTemplate(text="{{ bos_token + messages[0].content }}")) == f"{bos}1+1?"
    with pytest.raises(UserError, match=r"the prompt '1\+1\?' cannot be rendered: .*refuses it"):
        asked(ChatTemplate(text="{{ raise_exception('no') }}"))
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer: neither"):
        asked(None)


def test_a_prompt_is_not_asked_bare_where_the_named_template_is_gone() -> None:
    tokenizer = adding_bos("llama3", LLAMA3)
    with pytest.raises(ChatError, match="the model folder has no chat template named 'rag'"):
        BoundTemplate(tokenizer, ChatTemplate(name="rag")).prompt_ids("hi")


def test_a_prompt_without_a_template_begins_as_the_tokenizer_does() -> None:
    tokenizer = adding_bos("llama3", LLAMA3)
    tokenizer.chat_template = None
    assert BoundTemplate(tokenizer).prompt_ids("hi") == tokenizer("hi")["input_ids"]


@pytest.mark.parametrize(
    ("extra", "tools"),
    [
        ({"content": "a <|im_end|> b"}, None),
        ({"reasoning_content": "a <|im_end|> b"}, None),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": ["<|im_end|>"]}}}]}, None),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}]}, None),
        ({}, [{"function": {"name": "f", "description": "<|im_end|>"}}]),
    ],
)
def test_special_tokens_are_seen_wherever_a_rows_text_has_them(extra: dict[str, Any], tools: Any) -> None:
    masker = ChatMasker(byte_level_tokenizer("qwen2.5", unmarked(QWEN25)))
    assert masker.holds_special([QUESTION, PLAIN | extra], tools)
    assert not masker.holds_special([QUESTION, PLAIN], [TOOL])


def losing_blanks() -> PreTrainedTokenizerFast:
    """The vocabulary of a byte-level tokenizer, read as sentencepiece's: ▁ is not in it, and blanks vanish."""
    tokenizer = byte_level_tokenizer("smollm2", unmarked(SMOLLM2))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


def test_a_tokenizer_that_loses_characters_is_refused() -> None:
    tokenizer = losing_blanks()
    masker = ChatMasker(tokenizer)
    with pytest.raises(PrepareError, match=r"loses characters: of '.*Be of help.*' it leaves '.*Beofhelp"):
        masker.encode(masker.rows([QUESTION, PLAIN]))


@pytest.mark.parametrize("text", ["Größe 東京 🙂", "a  b\t\tc\n\n\nd ", "▁x", "<|im_start|> y"])
@pytest.mark.parametrize("make", [byte_level_tokenizer, adding_bos])
def test_what_comes_back_is_not_lost(text: str, make: Any) -> None:
    masker = ChatMasker(make("smollm2", unmarked(SMOLLM2)))
    (masked,) = masker.encode(masker.rows([QUESTION | {"content": text}, PLAIN]))
    assert not masked.loses


def word_tokenizer(**backend: Any) -> PreTrainedTokenizerFast:
    vocab = {token: id_ for id_, token in enumerate(["<unk>", "</s>", *map(chr, range(9, 127))])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], **backend))
    made.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=made, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("backend", [{"unk_token": "<unk>"}, {}])
def test_rows_with_characters_that_the_vocabulary_lacks_are_counted(
    backend: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = word_tokenizer(**backend)
    masker = ChatMasker(tokenizer)
    masked = masker.encode([masker.render([QUESTION | {"content": text}, PLAIN]) for text in ("x", "Größe")])
    assert [row.loses for row in masked] == [False, True]
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": text, "completion": "a"} for text in ("x", "Größe", "é")]
    done = prepare(write_rows(tmp_path / "c.jsonl", rows), tmp_path / "model", tmp_path / "t.parquet")
    assert [w for w in done["warnings"] if w.startswith("2 rows with characters that the tokenizer's vocab")]
    labels = pq.read_table(tmp_path / "t.parquet")["labels"].to_pylist()
    assert all(label != IGNORE_INDEX for label in (row[-1] for row in labels))
