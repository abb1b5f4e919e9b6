"""What is trained under the templates of several families: against transformers' own masks, and checked by hand."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.rows import IGNORE_INDEX
from sftd.trainer.chat.errors import ChatError
from sftd.trainer.chat.mask import ChatMasker, MaskedChat
from sftd.trainer.chat.render import RenderedChat
from tests.builders.trainer.chat_templates import (
    FAMILIES,
    MISTRAL,
    QWEN3,
    QWEN25,
    SPECIALS,
    WITH_TOOLS,
    Chat,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    unmarked,
)

_SMOLLM2 = (
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sftd/models/SmolLM2-135M-Instruct"
)

# Letters, digits and signs of several scripts, blanks of all kinds; an answer neither begins nor ends with a blank.
_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("ab {}\n0"), min_size=1)
_ANSWER = _TEXT.map(str.strip).filter(bool)
_ARGUMENTS = st.dictionaries(st.sampled_from(["city", "n", "é"]), _ANSWER | st.integers(), max_size=2)
_CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["weather", "add"]),
    _ARGUMENTS,
)
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}]


@st.composite
def chats(draw: st.DrawFn, *, tools: bool = False, thinks: bool = False) -> Chat:
    """A chat of several turns; with `tools` some answers call tools first, with `thinks` some have reasoning."""
    messages: Chat = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_ANSWER)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(_TEXT)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            messages.append({"role": "assistant", "content": "", "tool_calls": [draw(_CALL)]})
            messages.append({"role": "tool", "content": draw(_ANSWER)})
        messages.append({"role": "assistant", "content": draw(_ANSWER)})
    if thinks:
        for message in messages:
            how = (
                draw(st.sampled_from(["not", "field", "inline"])) if message["role"] == "assistant" else "not"
            )
            if how == "field":
                message["reasoning_content"] = draw(_ANSWER)
            elif how == "inline":
                message["content"] = f"<think>\n{draw(_ANSWER)}\n</think>\n\n{message['content']}"
    return messages


def theirs(tokenizer: Any, messages: Chat, tools: list[Any] | None) -> tuple[list[int], list[int]]:
    """Token ids and labels by transformers' own mask."""
    made = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        id_ if trained else IGNORE_INDEX
        for id_, trained in zip(made["input_ids"], made["assistant_masks"], strict=True)
    ]
    return made["input_ids"], labels


def ours(tokenizer: Any, messages: Chat, tools: list[Any] | None) -> MaskedChat:
    masker = ChatMasker(tokenizer, {tokenizer.eos_token_id})
    (masked,) = masker.encode([masker.render(messages, tools)])
    assert masked.unstopped == 0
    return masked


def trained(tokenizer: Any, rows: list[RenderedChat]) -> list[list[str]]:
    """The trained runs of tokens of each row, as text."""
    texts = []
    for row in ChatMasker(tokenizer, {tokenizer.eos_token_id}).encode(rows):
        pairs = zip(row.input_ids, row.labels, strict=True)
        runs = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
        texts.append([tokenizer.decode([id_ for id_, _ in run]) for is_trained, run in runs if is_trained])
    return texts


def real_tokenizer(family: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = AutoTokenizer.from_pretrained(_SMOLLM2)
    bos, eos, *more = SPECIALS[family]
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos, "additional_special_tokens": more})
    made: PreTrainedTokenizerFast = tokenizer
    return made


def compare(tokenizer: Any, family: str, messages: Chat, tools: list[Any] | None) -> None:
    """Marked or not, the masks are transformers' own."""
    tokenizer.chat_template = FAMILIES[family]
    ids, labels = theirs(tokenizer, messages, tools)
    assert any(label != IGNORE_INDEX for label in labels)
    for template in (FAMILIES[family], unmarked(FAMILIES[family])):
        tokenizer.chat_template = template
        masked = ours(tokenizer, messages, tools)
        assert (masked.input_ids, masked.labels) == (ids, labels)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_masks_are_transformers_own(family: str) -> None:
    tokenizer = byte_level_tokenizer(family, FAMILIES[family])

    @settings(max_examples=40)
    @given(chats(tools=family in WITH_TOOLS), st.booleans())
    def check(messages: Chat, is_told: bool) -> None:
        compare(tokenizer, family, messages, TOOLS if is_told and family in WITH_TOOLS else None)

    check()


@pytest.mark.real_model
@pytest.mark.skipif(not _SMOLLM2.is_dir(), reason="needs the demo model: `make demo` fetches it")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_masks_are_transformers_own_with_a_real_tokenizer(family: str) -> None:
    tokenizer = real_tokenizer(family)

    @settings(max_examples=15)
    @given(chats(tools=family in WITH_TOOLS))
    def check(messages: Chat) -> None:
        compare(tokenizer, family, messages, None)

    check()


@settings(max_examples=60)
@given(chats(tools=True, thinks=True))
def test_split_rows_train_each_answer_once_behind_its_prompt(messages: Chat) -> None:
    tokenizer = byte_level_tokenizer("qwen3", unmarked(QWEN3))

    def text(upto: int, *, prompt: bool = False) -> str:
        made = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)
        return str(made)

    # What the model is shown and what it writes, by the template alone.
    wanted = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, whole = text(turn, prompt=True), text(turn + 1)
            assert whole.startswith(prompt)
            wanted.append((prompt, whole[len(prompt) :].removesuffix("<|im_end|>\n")))
    rows = ChatMasker(tokenizer).rows(messages, None, "split")
    found = [(row.text[:start], row.text[start:end]) for row in rows for start, end in row.answers]
    assert sorted(found) == sorted(wanted)


THOUGHT: Chat = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "Easy, too.", "content": "4"},
]
LAST = "<think>\nEasy, too.\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("template", [QWEN3, unmarked(QWEN3)])
def test_reasoning_that_a_template_drops_is_refused_masked_or_split(template: str) -> None:
    tokenizer = byte_level_tokenizer("qwen3", template)
    masker = ChatMasker(tokenizer)
    with pytest.raises(ChatError, match=r"message 2 .*reasoning out of earlier answers.*--rewritten split"):
        masker.render(THOUGHT)
    (masked,) = masker.rows(THOUGHT, None, "mask")
    assert masked.rewritten == 1
    assert trained(tokenizer, [masked]) == [[LAST]]
    split = masker.rows(THOUGHT, None, "split")
    assert trained(tokenizer, split) == [["<think>\nEasy.\n</think>\n\n2<|im_end|>"], [LAST]]
    assert "Easy." not in split[1].text


def test_answers_that_lack_the_templates_own_beginning_are_counted() -> None:
    tokenizer = byte_level_tokenizer("qwen3", unmarked(QWEN3))
    plain = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in THOUGHT]
    plain[1]["content"] = "2"
    (row,) = ChatMasker(tokenizer).rows(plain)
    assert (row.as_shown, trained(tokenizer, [row])) == (
        1,
        [["2<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]],
    )
    # Told not to think, the model is given the empty block, and both answers are as it writes them.
    (row,) = ChatMasker(tokenizer, chosen=ChatTemplate(arguments={"enable_thinking": False})).rows(plain)
    assert (row.as_shown, trained(tokenizer, [row])) == (0, [["2<|im_end|>", "4<|im_end|>"]])


CALLS: Chat = [
    {"role": "system", "content": "Metric."},
    {"role": "user", "content": "Warm in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "21 °C"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize(
    ("family", "answers"),
    [
        (
            "qwen2.5",
            ['<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "Yes.", "Bye"],
        ),
        ("llama3", ['{"name": "weather", "parameters": {"city": "Rome"}}', "Yes.", "Bye"]),
        ("mistral", ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', " Yes.", " Bye"]),
    ],
)
def test_tool_calls_are_trained_and_results_are_not(family: str, answers: list[str], make: Any) -> None:
    tokenizer = make(family, unmarked(FAMILIES[family]))
    stop = SPECIALS[family][1]
    rows = ChatMasker(tokenizer).rows(CALLS, TOOLS)
    assert trained(tokenizer, rows) == [[answer + stop for answer in answers]]
    assert "21 °C" in rows[0].text
    assert "Tells it." in rows[0].text


def test_an_answer_with_the_weight_0_is_not_trained() -> None:
    messages = [{**m, "weight": 0} if m.get("content") == "Yes." else m for m in CALLS]
    for template in (MISTRAL, unmarked(MISTRAL)):
        tokenizer = byte_level_tokenizer("mistral", template)
        (runs,) = trained(tokenizer, ChatMasker(tokenizer).rows(messages, TOOLS))
        assert runs[1:] == [" Bye</s>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FAMILIES["smollm2"], CALLS, "leaves out the tool calls of the assistant's message 3"),
        (QWEN25.replace("{{ m.content }}", "{{ m.content[:2] }}"), CALLS, "leaves out part of the content"),
        (
            QWEN25,
            [*THOUGHT[:3], {"role": "assistant", "content": "4", "thinking": "hm"}],
            "leaves out the reasoning",
        ),
        (
            QWEN25.replace("m.role == 'user' or", "loop.last and"),
            CALLS[4:],
            "leaves out or changes message 2 .user.",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(template: str, messages: Chat, message: str) -> None:
    tokenizer = byte_level_tokenizer("qwen2.5", unmarked(template))
    with pytest.raises(ChatError, match=message):
        ChatMasker(tokenizer).render(messages)


def test_tools_that_a_template_does_not_know_are_refused() -> None:
    tokenizer = byte_level_tokenizer("smollm2", unmarked(FAMILIES["smollm2"]))
    with pytest.raises(ChatError, match="does not show the model the tool 'weather'"):
        ChatMasker(tokenizer).render(CALLS[5:], TOOLS)
