"""Renders conversations under any chat template, and finds the model's answers in the text.

An answer is the text that the model writes at inference after the prompt of the previous messages. Most templates render a
turn in the same way whether or not others follow. Then the answer is the text between the prompt and the end of the chat
that ends with it. Some templates change earlier turns (Qwen3 cuts out their reasoning). There the renderer searches for the
answer, and reports it as rewritten if the original text is not found. Templates that mark answers themselves
(`{% generation %}`) are trusted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sftd.domain.data.chat_template import ChatTemplate
from sftd.trainer.chat import tool_arguments
from sftd.trainer.chat.errors import ChatError, left_out, rewritten_answer, without_reasoning
from sftd.trainer.chat.kept_text import doubtful_messages, first_lost_message, first_lost_tool, lost_of_answer
from sftd.trainer.chat.reasoning import REASONING, as_written, opened_tag
from sftd.trainer.chat.template import BoundTemplate, Message, Span, marks_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Treatment of answers that the template rewrites when other turns follow.
Rewritten = Literal["refuse", "mask", "split"]

# Replaces an answer to find the template's text around it.
_PLACEHOLDER = "sftdAnswerPlaceholder"
_QUESTION: Message = {"role": "user", "content": "Question?"}


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the character spans of its trained answers. A span may or may not include the stop token.

    `weights`: of each answer's loss. `rewritten`: number of answers that are left out because the template rewrote them. `as_shown`: number of answers that
    are trained as in the text, although at inference the template puts something before them. `template`: its name.
    `arguments`: the form of the tool calls' arguments, None without calls.
    """

    text: str
    answers: list[Span]
    weights: list[float]
    rewritten: int = 0
    as_shown: int = 0
    template: str = "default"
    arguments: tool_arguments.Form | None = None


@dataclass(frozen=True)
class _Turn:
    """The template's text before and after an answer in a chat."""

    before: str
    after: str


@dataclass
class _Located:
    """The answers of a chat by turn: their spans, and the turns whose text differs from the model's output."""

    text: str
    spans: dict[int, Span]
    as_shown: set[int]
    rewritten: set[int]


class ChatRenderer:
    """Renders with one tokenizer's chat template, as `chosen`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chosen: ChatTemplate | None = None) -> None:
        self.template = BoundTemplate(tokenizer, chosen)
        # The template's text after an answer, and its generation prompt. They are the same in nearly every chat.
        self.probe_text: str | None = None
        self._closing: str | None = None
        self._opening = ""
        try:
            turn = self._around([_QUESTION, {"role": "assistant", "content": ""}], None, 1)
            self.probe_text = turn.before + _PLACEHOLDER + turn.after
            self._closing = turn.after
            plain = self.template.render([_QUESTION], None)
            prompt = self.template.render([_QUESTION], None, add_generation_prompt=True)
            self._opening = prompt.removeprefix(plain) if prompt.startswith(plain) else ""
        except ChatError:
            pass  # the template rejects the probe; the rows will show whether it works

    @property
    def probe_answer_end(self) -> int:
        """End of the answer in `probe_text`."""
        return len((self.probe_text or "").partition(_PLACEHOLDER)[0]) + len(_PLACEHOLDER)

    def rows(
        self, messages: Sequence[Message], tools: list[Any] | None = None, rewritten: Rewritten = "refuse"
    ) -> list[RenderedChat]:
        """The texts to train on, with their answers: one per conversation, or several with `split`.

        The template gets the arguments of tool calls as objects. If it fails or prints them as Python does, it gets their
        JSON text. Raises ChatError when the template rejects the messages, leaves a part of them out, or rewrites an answer
        and `rewritten` is `refuse`.
        """
        trained = {
            turn: float(message.get("weight", 1))
            for turn, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        }
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        messages, form, whole = self._locate_in_form(messages, tools, trained)
        if rewritten == "split":
            rows = self._split(messages, tools, trained, whole)
        elif whole.rewritten and rewritten == "refuse":
            raise rewritten_answer(min(whole.rewritten))
        else:
            rows = [_row(whole, trained, None, len(whole.rewritten), len(whole.as_shown))]
        name = self.template.name(tools)
        return [replace(row, template=name, arguments=form) for row in rows]

    def _locate_in_form(
        self, messages: list[Message], tools: list[Any] | None, turns: Mapping[int, float]
    ) -> tuple[list[Message], tool_arguments.Form | None, _Located]:
        """The messages with their calls' arguments in the form that the template supports, that form, and the answers."""
        if not tool_arguments.have_objects(messages):
            form: tool_arguments.Form | None = "text" if any(m.get("tool_calls") for m in messages) else None
            return messages, form, self._locate(messages, tools, turns)
        located, refusal = None, None
        try:
            located = self._locate(messages, tools, turns)
        except ChatError as error:
            refusal = error
        if located is None or tool_arguments.printed_by_python(messages, located.text):
            texts = tool_arguments.as_text(messages)
            try:
                return texts, "text", self._locate(texts, tools, turns)
            except ChatError as error:
                # Both forms fail for the first one's reason, or the template supports objects only.
                if located is None:
                    raise refusal or error from None
        return messages, "object", located

    def _split(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        weights: Mapping[int, float],
        whole: _Located,
    ) -> list[RenderedChat]:
        """The whole chat with its unchanged answers, and further chats that end with the other answers."""
        left = whole.rewritten | whole.as_shown
        exact = set(whole.spans) - left
        rows = [_row(whole, weights, exact)] if exact else []
        while left:
            turn = max(left)
            part = self._locate(messages[: turn + 1], tools, {t: weights[t] for t in left if t <= turn})
            exact = set(part.spans) - part.rewritten - part.as_shown
            if turn not in exact:
                tag = opened_tag(self._opening) if turn in part.as_shown else None
                raise (
                    without_reasoning(turn, tag)
                    if tag
                    else rewritten_answer(turn, "even where nothing follows it")
                )
            rows.append(_row(part, weights, exact))
            left -= exact
        return rows[::-1]

    def _locate(
        self, messages: Sequence[Message], tools: list[Any] | None, turns: Mapping[int, float]
    ) -> _Located:
        """Find the answers of the given turns, whose values are their weights."""
        if any(_PLACEHOLDER in str(message.get("content")) for message in messages):
            raise ChatError(f"a message contains {_PLACEHOLDER!r}, which is reserved; remove it")
        if marks_answers(self.template.source(tools)):
            located = self._locate_marked(messages, tools, turns)
        else:
            located = _Located(self._whole(messages, tools), {}, set(), set())
            for each in sorted(turns):
                self._locate_answer(messages, tools, each, located)
        lost = first_lost_message(messages, located.text)
        if (turn := lost if lost is not None else self._first_unseen(messages, tools)) is not None:
            raise ChatError(
                f"the chat template leaves out or changes message {turn + 1} ({messages[turn]['role']}), so the model "
                "would not see the original. Remove it, or use a model folder whose chat template supports such messages"
            )
        if (name := first_lost_tool(tools, located.text)) is not None:
            raise ChatError(
                f"the chat template does not show the model the tool {name!r}. Remove the tools from the row, or use a "
                "model folder whose chat template supports tools"
            )
        return located

    def _first_unseen(self, messages: Sequence[Message], tools: list[Any] | None) -> int | None:
        """The first message that the template leaves out although its words occur elsewhere in the text, such as a tool's
        "4" before the answer "It is 4"."""
        doubtful = {turn: f"{_PLACEHOLDER}{turn}." for turn in doubtful_messages(messages)}
        if not doubtful:
            return None
        replaced = [m | {"content": doubtful.get(turn, m.get("content"))} for turn, m in enumerate(messages)]
        shown = self._try_render(replaced, tools)
        if shown is None:
            return None  # the template rejects the replaced content
        return next((turn for turn, words in doubtful.items() if words not in shown), None)

    def _locate_answer(
        self, messages: Sequence[Message], tools: list[Any] | None, turn: int, located: _Located
    ) -> None:
        text, message = located.text, messages[turn]
        alone = text if turn + 1 == len(messages) else self._try_whole(messages[: turn + 1], tools)
        prompt = self._try_render(messages[:turn], tools, add_generation_prompt=True) if turn else None
        if alone is None or prompt is None or not alone.startswith(prompt):
            self._locate_shown(messages, tools, turn, located, prompt)
            return
        if lost := lost_of_answer(message, alone[len(prompt) :], prompt):
            raise left_out(turn, lost)
        start = len(prompt)
        if not (self._opening and prompt.endswith(self._opening)) and prompt == self._try_render(
            messages[:turn], tools
        ):
            # Without a generation prompt the role header comes first. If it is blank, the model must write it.
            header = self._around(messages[: turn + 1], tools, turn).before[start:]
            if header.strip():
                if not alone.startswith(header, start):
                    raise rewritten_answer(turn)
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
            # The template's own text before a last answer, such as an empty think block. It may begin in the generation
            # prompt.
            lead = self._around(messages[: turn + 1], tools, turn).before[start:]
            bare = written.removeprefix(lead)
            shown = stop - len(bare)
            if (
                written == lead + bare
                and text[:stop].endswith(bare)
                and start - len(self._opening) <= shown <= start
                and text[:shown] == alone[:shown]
            ):
                located.spans[turn] = (shown, stop)
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
        """Find an answer that has no prompt, or whose prompt differs from the template's later text."""
        text = located.text
        around = self._around(messages, tools, turn)
        end = self._end(messages, tools, turn, text)
        start = len(around.before)
        if end is None or start > end or not text.startswith(around.before):
            located.rewritten.add(turn)
            return
        if lost := lost_of_answer(messages[turn], text[start:end], text[:start]):
            raise left_out(turn, lost)
        located.spans[turn] = (start, end)
        if prompt is not None:
            located.as_shown.add(turn)

    def _closing_of(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, alone: str) -> str:
        """The template's text after the answer at the end of `alone`; empty if unknown."""
        if self._closing is not None and alone.endswith(self._closing):
            return self._closing
        if messages[turn].get("tool_calls"):
            return ""
        closing = self._around(messages[: turn + 1], tools, turn).after
        return closing if alone.endswith(closing) else ""

    def _end(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, text: str) -> int | None:
        """End of the answer in the whole text; None if the text after it differs from the text after a placeholder."""
        after = self._around(messages, tools, turn, in_call=True).after
        if not text.endswith(after):
            return None
        end = len(text) - len(after)
        if not messages[turn].get("tool_calls"):
            return end
        # The placeholder is the name in the last call. The text from there to the closing belongs to the answer.
        rest = self._around(messages[: turn + 1], tools, turn, in_call=True).after
        if self._closing is None or not rest.endswith(self._closing):
            return None
        return end + len(rest) - len(self._closing)

    def _around(
        self, messages: Sequence[Message], tools: list[Any] | None, turn: int, *, in_call: bool = False
    ) -> _Turn:
        """The text before and after the content of an answer without its reasoning and calls. With `in_call`, for an answer
        with calls: the text before and after the function's name in the last call."""
        message = {key: value for key, value in messages[turn].items() if key not in REASONING}
        calls = message.pop("tool_calls", None)
        if in_call and calls:
            last = {**calls[-1], "function": {**calls[-1]["function"], "name": _PLACEHOLDER}}
            replaced = {**messages[turn], "tool_calls": [*calls[:-1], last]}
        else:
            replaced = {**message, "content": _PLACEHOLDER}
        parts = self._whole([*messages[:turn], replaced, *messages[turn + 1 :]], tools).split(_PLACEHOLDER)
        if len(parts) != 2:
            raise ChatError(
                f"the chat template writes the assistant's message {turn + 1} {len(parts) - 1} times, not "
                "once; use a model folder with another chat template"
            )
        return _Turn(*parts)

    def _locate_marked(
        self, messages: Sequence[Message], tools: list[Any] | None, turns: Mapping[int, float]
    ) -> _Located:
        """Render under a template that marks the answers itself."""
        text, marked = self.template.render_marked(messages, tools)
        blocks = _joined(marked)
        if not blocks:
            raise ChatError("the chat template marks no text of this chat as the assistant's")
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(answers):
            if [turns.get(turn) for turn in answers] != [1] * len(answers):
                raise ChatError(
                    f"the chat template marks {len(blocks)} answers of {len(answers)}, so those with a weight cannot "
                    "be identified. Leave out the weights, or use another chat template"
                )
            return _Located(text, dict(enumerate(blocks)), set(), set())
        spans = {turn: span for turn, span in zip(answers, blocks, strict=True) if turn in turns}
        lost = {
            turn
            for turn, (start, end) in spans.items()
            if lost_of_answer(messages[turn], text[start:end], text[:start])
        }
        return _Located(text, {t: s for t, s in spans.items() if t not in lost}, set(), lost)

    def _whole(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """The text of a chat. If the generation prompt opens reasoning, an answer at the end is the model's output after
        that prompt, even if the template shows no reasoning."""
        text = self.template.render(messages, tools)
        last = messages[-1]
        written = as_written(last, self._opening) if last["role"] == "assistant" else None
        if written is None or self._closing is None:
            return text
        prompt = self._try_render(messages[:-1], tools, add_generation_prompt=True)
        if prompt is None or not prompt.endswith(self._opening):
            return text
        if text.startswith(prompt) and not lost_of_answer(last, text[len(prompt) :], prompt):
            return text
        return prompt + written + self._closing

    def _try_whole(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        """The text of a chat; None if the template rejects it."""
        try:
            return self._whole(messages, tools)
        except ChatError:
            return None

    def _try_render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str | None:
        """The template's text; None if it rejects the messages (such as a system message alone)."""
        try:
            return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        except ChatError:
            return None


def _row(
    located: _Located,
    weights: Mapping[int, float],
    turns: set[int] | None,
    rewritten: int = 0,
    as_shown: int = 0,
) -> RenderedChat:
    """The chat with the answers of the given turns, by default all. A turn without a weight has 1."""
    spans = {turn: span for turn, span in sorted(located.spans.items()) if turns is None or turn in turns}
    return RenderedChat(
        located.text, [*spans.values()], [weights.get(turn, 1.0) for turn in spans], rewritten, as_shown
    )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The non-empty spans, with touching ones merged."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined
