"""Turns conversations into token ids and labels under any chat template.

Trained are, of each assistant turn, the tokens that the model has to produce at inference: what
follows the generation prompt, up to and with the stop token. The role header, the newline that many
templates put after the stop token, and all other turns are not.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftd.trainer.prepare.errors import ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end), in characters or in tokens

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands in for an answer to see what the template puts around it.
_PLACEHOLDER = "sftdAnswerPlaceholder"


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the character spans of its answers, without their stop tokens."""

    text: str
    answers: list[Span]


@dataclass(frozen=True)
class MaskedChat:
    """A tokenised conversation.

    `input_ids` [n]; `labels` [n], unshifted: `labels[i] == input_ids[i]` on trained tokens, -100
    elsewhere. `unstopped` counts the answers that no stop token follows.
    """

    input_ids: list[int]
    labels: list[int]
    unstopped: int


class ChatMasker:
    """Renders, tokenises and masks conversations with one tokenizer.

    `stop_ids` are the token ids at which generation ends; the special token that the chat template
    itself puts after an answer is added to them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = {*tokenizer.all_special_ids, *stop_ids}
        self._special_ids.update(
            id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self._stop_ids = set(stop_ids)
        self._marks_answers = bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template()))
        self._template_stop = self._find_template_stop()
        if self._template_stop is not None:
            self._stop_ids.add(self._template_stop)

    @property
    def stop_token(self) -> str | None:
        """The token that the chat template puts after an answer; None when it puts no special one."""
        if self._template_stop is None:
            return None
        return str(self._tokenizer.convert_ids_to_tokens(self._template_stop))

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Render a conversation and find its answers.

        `messages` are dicts of `role` and `content`, at least one of them an assistant's. Raises
        ChatError when the template refuses them, or changes an answer so that it cannot be found.
        """
        if self._marks_answers:
            return self._render_marked(messages)
        text = self._render(messages)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        return RenderedChat(text, [self._answer_span(messages, turn, text) for turn in turns])

    def encode(self, chats: Sequence[RenderedChat]) -> list[MaskedChat]:
        """Tokenise rendered conversations, each text once and whole, and label their answers."""
        if not chats:
            return []
        # The template has written all special tokens, so the tokenizer must not add its own.
        encoded = self._tokenizer(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # the caller deals with rows longer than the model's context
        )
        rows = zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._mask(chat, ids, offsets) for chat, ids, offsets in rows]

    def _mask(self, chat: RenderedChat, ids: list[int], offsets: Sequence[Span]) -> MaskedChat:
        spans = _contiguous(offsets)
        labels = [IGNORE_INDEX] * len(ids)
        unstopped = 0
        token = 0
        for start, end in chat.answers:
            while token < len(ids) and not _carries(chat.text, spans[token], start):
                token += 1
            first = token
            while token < len(ids) and spans[token][0] < end:
                token += 1
            last, stopped = self._close(chat.text, ids, spans, first, token)
            unstopped += not stopped
            labels[first:last] = ids[first:last]
        return MaskedChat(ids, labels, unstopped)

    def _close(self, text: str, ids: list[int], spans: list[Span], first: int, end: int) -> tuple[int, bool]:
        """Where the answer in tokens [first, end) ends with its stop token, and whether it has one."""
        # A template's generation block may hold the stop token and the newline after it, too.
        inside = end
        while inside > first and ids[inside - 1] not in self._stop_ids and _blank(text, spans[inside - 1]):
            inside -= 1
        if inside > first and ids[inside - 1] in self._stop_ids:
            return inside, True
        # Some templates put a blank between the answer and the stop token; the model must write it, too.
        after = end
        while after < len(ids) and ids[after] not in self._special_ids and _blank(text, spans[after]):
            after += 1
        if after < len(ids) and ids[after] in self._stop_ids:
            return after + 1, True
        return end, False

    def _answer_span(self, messages: Sequence[Message], turn: int, text: str) -> Span:
        content: str = messages[turn]["content"]
        head, tail = self._around(messages, turn)
        end = len(text) - len(tail)
        start = len(head) if text.startswith(head) else None
        prompt = self._generation_prompt(messages[:turn])
        if prompt is not None and text.startswith(prompt) and len(prompt) <= end:
            between = text[len(prompt) : start] if start is not None else content
            # Where the template knows no generation prompt, the role header lies between.
            if not between.strip() or prompt != self._render(messages[:turn]):
                start = len(prompt)
        elif prompt is not None and start is not None:
            # The template writes earlier turns otherwise when others follow. The blanks that the model
            # has to write between prompt and answer are seen in the chat that ends here.
            lead = self._around(messages[: turn + 1], turn)[0].removeprefix(prompt)
            if not lead.strip() and head.endswith(lead):
                start -= len(lead)
        found = text.endswith(tail) and text[:end].rstrip().endswith(content.strip())
        if start is None or start > end or not found:
            raise ChatError(
                f"the chat template changes the assistant's message {turn + 1} otherwise than by trimming it "
                "(some cut the reasoning out of earlier answers), so its tokens cannot be found. Give the "
                "content as the template renders it, or split the chat so that it ends with this answer"
            )
        return start, end

    def _around(self, messages: Sequence[Message], turn: int) -> tuple[str, str]:
        """The text before and after the content of one message."""
        if any(_PLACEHOLDER in message["content"] for message in messages):
            raise ChatError(f"a message contains {_PLACEHOLDER!r}, which is reserved; remove it")
        replaced = [*messages]
        replaced[turn] = {**messages[turn], "content": _PLACEHOLDER}
        parts = self._render(replaced).split(_PLACEHOLDER)
        if len(parts) != 2:
            raise ChatError(
                f"the chat template writes the assistant's message {turn + 1} {len(parts) - 1} times, not "
                "once; use a model folder with another chat template"
            )
        return parts[0], parts[1]

    def _generation_prompt(self, messages: Sequence[Message]) -> str | None:
        """The prompt at which the model would answer; None where the template has none for these messages."""
        if not messages:
            return None
        try:
            return self._render(messages, add_generation_prompt=True)
        except ChatError:  # such as a template that wants the system message with a user's
            return None

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of its own; it can fail in any way
            raise ChatError(_refusal(error)) from error
        return str(text)

    def _render_marked(self, messages: Sequence[Message]) -> RenderedChat:
        """Render under a template that marks the answers itself, with `{% generation %}`."""
        # apply_chat_template gives this mask by tokens, but loses an answer that begins with a blank;
        # the characters' spans, which it computes it from, are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations are wrong
        try:
            texts, spans = render(
                conversations=[list(messages)],
                chat_template=self._tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise ChatError(_refusal(error)) from error
        answers = [(start, end) for start, end in spans[0] if end > start]
        if not answers:
            raise ChatError("the chat template marks no text of this chat as the assistant's")
        return RenderedChat(texts[0], answers)

    def _find_template_stop(self) -> int | None:
        """The id of the special token that the template puts after an answer, if it does."""
        question: Message = {"role": "user", "content": "Question?"}
        try:
            text = self._render([question, {"role": "assistant", "content": _PLACEHOLDER}])
        except ChatError:
            return None  # the template wants other messages; the rows will show
        end = text.rfind(_PLACEHOLDER) + len(_PLACEHOLDER)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for id_, span in zip(encoded["input_ids"], _contiguous(encoded["offset_mapping"]), strict=True):
            if span[0] < end:
                continue
            if id_ in self._special_ids:
                return int(id_)
            if not _blank(text, span):
                break
        return None


def _contiguous(offsets: Sequence[Span]) -> list[Span]:
    """The tokens' spans with no gaps: a blank that an offset leaves out belongs to the token after it.

    Byte-level tokenizers trim blanks from the offsets, down to an empty span for a token of blanks.
    """
    spans: list[Span] = []
    reached = 0
    for start, end in offsets:
        spans.append((min(start, reached), end))
        reached = max(reached, end)
    return spans


def _carries(text: str, span: Span, start: int) -> bool:
    """Whether the token at `span` is the first, or a later one, of the answer that begins at `start`.

    A token that begins in the header counts when it carries more than blanks of the answer (such as
    " word" after a header that ends in a blank).
    """
    return span[0] >= start or not _blank(text, (start, span[1]))


def _blank(text: str, span: Span) -> bool:
    return not text[span[0] : span[1]].strip()


def _refusal(error: Exception) -> str:
    return f"the model's chat template refuses it ({type(error).__name__}: {error})"
