"""Renders conversations under any chat template, and finds in the text what the model has to write.

An answer is what the model writes at inference: what follows the prompt of the messages before it. Most templates leave a
turn as it is when others follow; then the answer stands between the prompt and the end of the chat that ends with it.
Some write earlier turns otherwise (Qwen3 cuts the reasoning out of them): there the answer is looked for, and either it
stands there as it was written, or it is told to have been rewritten. Templates that mark answers themselves
(`{% generation %}`) are taken at their word.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sftd.trainer.prepare.errors import ChatError
from sftd.trainer.prepare.kept_text import (
    doubtful_messages,
    first_lost_message,
    first_lost_tool,
    lost_of_answer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end), in characters or in tokens
# What becomes of answers that the template rewrites when other turns follow.
Rewritten = Literal["refuse", "mask", "split"]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands in for an answer to see what the template puts around it.
_PLACEHOLDER = "sftdAnswerPlaceholder"
_QUESTION: Message = {"role": "user", "content": "Question?"}
# Fields of an answer beside its content; a placeholder's message has none of the first kind.
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the character spans of its trained answers; a span may or may not hold the stop token.

    `rewritten` counts the answers that are left out because the template rewrote them, `as_shown` those that are trained
    as the text has them though the model writes something of the template's own before them.
    """

    text: str
    answers: list[Span]
    rewritten: int = 0
    as_shown: int = 0


@dataclass(frozen=True)
class _Turn:
    """How the template surrounds one answer in a chat: the text before a placeholder in its place, and behind it."""

    before: str
    behind: str


@dataclass
class _Located:
    """Every answer of a chat by its turn: where it stands, and which are not there as the model writes them."""

    text: str
    spans: dict[int, Span]
    as_shown: set[int]
    rewritten: set[int]


class ChatRenderer:
    """Renders with one tokenizer's chat template. `template_args` are variables that the template is given."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_args: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._args = dict(template_args or {})
        # What the template puts behind an answer and, as a generation prompt, before it: the same in nearly every chat.
        self.probe_text: str | None = None
        self._closing: str | None = None
        self._opening = ""
        try:
            turn = self._around([_QUESTION, {"role": "assistant", "content": ""}], None, 1)
            self.probe_text = turn.before + _PLACEHOLDER + turn.behind
            self._closing = turn.behind
            plain = self._render([_QUESTION], None)
            prompt = self._render([_QUESTION], None, add_generation_prompt=True)
            self._opening = prompt.removeprefix(plain) if prompt.startswith(plain) else ""
        except ChatError:
            pass  # the template wants other messages; the rows will show

    @property
    def probe_answer_end(self) -> int:
        """Where the answer ends in `probe_text`."""
        return len((self.probe_text or "").partition(_PLACEHOLDER)[0]) + len(_PLACEHOLDER)

    def marks_answers(self, tools: list[Any] | None = None) -> bool:
        """Whether the template marks what is trained."""
        return bool(_GENERATION_BLOCK.search(self._template(tools)))

    def rows(
        self, messages: Sequence[Message], tools: list[Any] | None = None, rewritten: Rewritten = "refuse"
    ) -> list[RenderedChat]:
        """The texts to train on, with their answers: one, or with `split` several of one conversation.

        Raises ChatError when the template refuses the messages, leaves out what they hold, or rewrites an answer and
        `rewritten` is `refuse`.
        """
        trained = {
            turn
            for turn, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        }
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        whole = self._locate(messages, tools, trained)
        if rewritten == "split":
            return self._split(messages, tools, whole)
        if whole.rewritten and rewritten == "refuse":
            raise ChatError(_rewritten(min(whole.rewritten)))
        return [_row(whole, None, len(whole.rewritten), len(whole.as_shown))]

    def _split(
        self, messages: Sequence[Message], tools: list[Any] | None, whole: _Located
    ) -> list[RenderedChat]:
        """The whole chat with the answers that stand there as written, and a chat that ends with each of the others."""
        left = whole.rewritten | whole.as_shown
        exact = set(whole.spans) - left
        rows = [_row(whole, exact)] if exact else []
        while left:
            turn = max(left)
            part = self._locate(messages[: turn + 1], tools, {t for t in left if t <= turn})
            exact = set(part.spans) - part.rewritten - part.as_shown
            if turn not in exact:
                raise ChatError(_rewritten(turn, "even where nothing follows it"))
            rows.append(_row(part, exact))
            left -= exact
        return rows[::-1]

    def _locate(self, messages: Sequence[Message], tools: list[Any] | None, turns: set[int]) -> _Located:
        if any(_PLACEHOLDER in str(message.get("content")) for message in messages):
            raise ChatError(f"a message contains {_PLACEHOLDER!r}, which is reserved; remove it")
        if self.marks_answers(tools):
            located = self._locate_marked(messages, tools, turns)
        else:
            located = _Located(self._render(messages, tools), {}, set(), set())
            for each in sorted(turns):
                self._locate_answer(messages, tools, each, located)
        lost = first_lost_message(messages, located.text)
        if (turn := lost if lost is not None else self._first_unseen(messages, tools)) is not None:
            raise ChatError(
                f"the chat template leaves out or changes message {turn + 1} ({messages[turn]['role']}), so the model "
                "would not see it as it is. Remove it, or use a model folder whose chat template knows such messages"
            )
        if (name := first_lost_tool(tools, located.text)) is not None:
            raise ChatError(
                f"the chat template does not tell the model of the tool {name!r}. Take the tools out of the row, or use a "
                "model folder whose chat template knows tools"
            )
        return located

    def _first_unseen(self, messages: Sequence[Message], tools: list[Any] | None) -> int | None:
        """The first message that the template leaves out though its words are in the text, by another message or by
        chance, such as a tool's "4" before the answer "It is 4"."""
        doubtful = {turn: f"{_PLACEHOLDER}{turn}." for turn in doubtful_messages(messages)}
        if not doubtful:
            return None
        stand_ins = [m | {"content": doubtful.get(turn, m.get("content"))} for turn, m in enumerate(messages)]
        shown = self._try_render(stand_ins, tools)
        if shown is None:
            return None  # it wants such a content as they have
        return next((turn for turn, words in doubtful.items() if words not in shown), None)

    def _locate_answer(
        self, messages: Sequence[Message], tools: list[Any] | None, turn: int, located: _Located
    ) -> None:
        text, message = located.text, messages[turn]
        alone = text if turn + 1 == len(messages) else self._try_render(messages[: turn + 1], tools)
        prompt = self._try_render(messages[:turn], tools, add_generation_prompt=True) if turn else None
        if alone is None or prompt is None or not alone.startswith(prompt):
            self._locate_shown(messages, tools, turn, located, prompt)
            return
        if lost := lost_of_answer(message, alone[len(prompt) :]):
            raise ChatError(_left_out(turn, lost))
        start = len(prompt)
        if not (self._opening and prompt.endswith(self._opening)) and prompt == self._try_render(
            messages[:turn], tools
        ):
            # Without a generation prompt the role header comes first; blanks the model has to write.
            header = self._around(messages[: turn + 1], tools, turn).before[start:]
            if header.strip():
                if not alone.startswith(header, start):
                    raise ChatError(_rewritten(turn))
                start += len(header)
        end = len(alone) - len(self._closing_of(messages, tools, turn, alone))
        written = alone[start:end]
        if text.startswith(alone):
            located.spans[turn] = (start, end)
            return
        stop = self._end(messages, tools, turn, text)
        if stop is None:
            located.rewritten.add(turn)
        elif text[:stop].endswith(written):
            located.spans[turn] = (stop - len(written), stop)
        else:
            # What the template itself puts before an answer where no other turn follows, such as an empty think block.
            lead = self._around(messages[: turn + 1], tools, turn).before[start:]
            if text.startswith(alone[:start]) and written == lead + text[start:stop]:
                located.spans[turn] = (start, stop)
                located.as_shown.add(turn)
            else:
                located.rewritten.add(turn)

    def _locate_shown(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        turn: int,
        located: _Located,
        prompt: str | None,
    ) -> None:
        """Where the answer stands, when there is no prompt for it, or another than the template writes later."""
        text = located.text
        around = self._around(messages, tools, turn)
        end = self._end(messages, tools, turn, text)
        start = len(around.before)
        if end is None or start > end or not text.startswith(around.before):
            located.rewritten.add(turn)
            return
        if lost := lost_of_answer(messages[turn], text[start:end]):
            raise ChatError(_left_out(turn, lost))
        located.spans[turn] = (start, end)
        if prompt is not None:
            located.as_shown.add(turn)

    def _closing_of(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, alone: str) -> str:
        """What the template puts behind the answer at the end of `alone`; empty where that cannot be told."""
        if self._closing is not None and alone.endswith(self._closing):
            return self._closing
        if messages[turn].get("tool_calls"):
            return ""
        closing = self._around(messages[: turn + 1], tools, turn).behind
        return closing if alone.endswith(closing) else ""

    def _end(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, text: str) -> int | None:
        """Where the answer ends in the whole text; None where what follows is not what follows a stand-in for it."""
        behind = self._around(messages, tools, turn, in_call=True).behind
        if not text.endswith(behind):
            return None
        end = len(text) - len(behind)
        if not messages[turn].get("tool_calls"):
            return end
        # The stand-in is a name in the last call: what follows it belongs to the answer up to its closing.
        rest = self._around(messages[: turn + 1], tools, turn, in_call=True).behind
        if self._closing is None or not rest.endswith(self._closing):
            return None
        return end + len(rest) - len(self._closing)

    def _around(
        self, messages: Sequence[Message], tools: list[Any] | None, turn: int, *, in_call: bool = False
    ) -> _Turn:
        """The text before and behind the content of one answer, stripped of its reasoning and calls; with `in_call`, of
        an answer with calls, before and behind the function's name in the last one."""
        message = {key: value for key, value in messages[turn].items() if key not in _REASONING}
        calls = message.pop("tool_calls", None)
        if in_call and calls:
            last = {**calls[-1], "function": {**calls[-1]["function"], "name": _PLACEHOLDER}}
            stand_in = {**messages[turn], "tool_calls": [*calls[:-1], last]}
        else:
            stand_in = {**message, "content": _PLACEHOLDER}
        parts = self._render([*messages[:turn], stand_in, *messages[turn + 1 :]], tools).split(_PLACEHOLDER)
        if len(parts) != 2:
            raise ChatError(
                f"the chat template writes the assistant's message {turn + 1} {len(parts) - 1} times, not "
                "once; use a model folder with another chat template"
            )
        return _Turn(*parts)

    def _locate_marked(
        self, messages: Sequence[Message], tools: list[Any] | None, turns: set[int]
    ) -> _Located:
        """Render under a template that marks the answers itself."""
        # apply_chat_template gives this mask by tokens, but loses an answer that begins with a blank;
        # the characters' spans, which it computes it from, are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations are wrong
        try:
            texts, marked = render(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._args},
            )
        except Exception as error:
            raise ChatError(_refusal(error)) from error
        blocks = _joined(marked[0])
        if not blocks:
            raise ChatError("the chat template marks no text of this chat as the assistant's")
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(answers):
            if len(turns) != len(answers):
                raise ChatError(
                    f"the chat template marks {len(blocks)} answers of {len(answers)}, so it cannot be told which of "
                    "them has the weight 0. Leave out the weights, or use another chat template"
                )
            return _Located(texts[0], dict(enumerate(blocks)), set(), set())
        spans = {turn: span for turn, span in zip(answers, blocks, strict=True) if turn in turns}
        lost = {t for t, (start, end) in spans.items() if lost_of_answer(messages[t], texts[0][start:end])}
        return _Located(texts[0], {t: s for t, s in spans.items() if t not in lost}, set(), lost)

    def _template(self, tools: list[Any] | None) -> str:
        return str(self._tokenizer.get_chat_template(tools=tools))

    def _try_render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str | None:
        """A text; None where the template refuses these messages (such as a system message alone)."""
        try:
            return self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        except ChatError:
            return None

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._args,
            )
        except Exception as error:  # a template is a program of its own; it can fail in any way
            raise ChatError(_refusal(error)) from error
        return str(text)


def _row(
    located: _Located, turns: set[int] | None = None, rewritten: int = 0, as_shown: int = 0
) -> RenderedChat:
    """The chat with the answers of some turns, by default of all that stand in it."""
    spans = [span for turn, span in sorted(located.spans.items()) if turns is None or turn in turns]
    return RenderedChat(located.text, spans, rewritten, as_shown)


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans with text in them, those that touch made one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined


def _rewritten(turn: int, when: str = "when other turns follow") -> str:
    return (
        f"the chat template changes the assistant's message {turn + 1} otherwise than by trimming it {when} (some cut "
        "the reasoning out of earlier answers), so what the model writes there is not in the text. Train it in a row of "
        "its own (--rewritten split), leave it out (--rewritten mask), or give the content as the template renders it"
    )


def _left_out(turn: int, what: str) -> str:
    return (
        f"the chat template leaves {what} of the assistant's message {turn + 1} out, so it would not be learned. Use a "
        "model folder whose chat template knows it, or take it out of the message"
    )


def _refusal(error: Exception) -> str:
    return f"the model's chat template refuses it ({type(error).__name__}: {error})"
