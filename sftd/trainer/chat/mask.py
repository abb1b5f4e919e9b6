"""Turns conversations into token ids and labels under any chat template.

Of each assistant turn, the tokens that the model must produce at inference are trained: from the end of the generation
prompt to the stop token, inclusive. The role header, the newline that many templates put after the stop token, and all
other turns are not trained.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.rows import IGNORE_INDEX
from sftd.trainer.chat.render import ChatRenderer, RenderedChat, Rewritten
from sftd.trainer.chat.round_trip import RoundTrip
from sftd.trainer.chat.template import BoundTemplate, Message, Span, marks_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MaskedChat:
    """A tokenised conversation.

    `input_ids` [n]; `labels` [n], unshifted: `labels[i] == input_ids[i]` on trained tokens, -100 elsewhere. `weights` [n]: of
    the loss of each trained token; None if all are 1. `unstopped`: number of answers without a stop token. `loses`: whether the vocabulary lacks characters of the text.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None
    unstopped: int
    loses: bool


class ChatMasker:
    """Renders, tokenises and masks conversations with one tokenizer.

    `stop_ids` are the token ids that end generation; the special token that the chat template puts after an answer is added
    to them. `chosen` is the chat template, by default the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Iterable[int] = (),
        chosen: ChatTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, chosen)
        self._round_trip = RoundTrip(tokenizer)
        self._special_ids = {*tokenizer.all_special_ids, *stop_ids}
        self._special_ids.update(
            id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self._stop_ids = set(stop_ids)
        special = sorted(filter(None, map(str, tokenizer.convert_ids_to_tokens(sorted(self._special_ids)))))
        self._special_text = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._template_stop = self._find_template_stop()
        if self._template_stop is not None:
            self._stop_ids.add(self._template_stop)

    @property
    def template(self) -> BoundTemplate:
        """The chat template in use."""
        return self._renderer.template

    @property
    def marks_answers(self) -> bool:
        """Whether a chat template in use marks the trained text."""
        return any(map(marks_answers, self.template.sources.values()))

    def holds_special(self, messages: Sequence[Message], tools: list[Any] | None = None) -> bool:
        """Whether a text of the messages or tools, at any depth, contains a special token of the tokenizer."""
        return any(map(self._special_text.search, _texts([messages, tools])))

    @property
    def stop_token(self) -> str | None:
        """The special token that the chat template puts after an answer; None if it puts none."""
        if self._template_stop is None:
            return None
        return str(self._tokenizer.convert_ids_to_tokens(self._template_stop))

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> RenderedChat:
        """The only row of a conversation. Raises ChatError as `rows` does, and when an answer is rewritten."""
        return self.rows(messages, tools)[0]

    def rows(
        self, messages: Sequence[Message], tools: list[Any] | None = None, rewritten: Rewritten = "refuse"
    ) -> list[RenderedChat]:
        """Render a conversation and find its answers (see `ChatRenderer.rows`).

        `messages` are dicts with `role` and `content`. At least one is the assistant's.
        """
        return self._renderer.rows(messages, tools, rewritten)

    def encode(self, chats: Sequence[RenderedChat]) -> list[MaskedChat]:
        """Tokenise rendered conversations, each text once and as a whole, and label their answers.

        Raises PrepareError when the tokenizer loses ASCII characters.
        """
        if not chats:
            return []
        # The template's text has all special tokens, so the tokenizer must not add its own.
        encoded = self._tokenizer(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # the caller handles rows longer than the model's context
        )
        rows = zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._mask(chat, ids, offsets) for chat, ids, offsets in rows]

    def _mask(self, chat: RenderedChat, ids: list[int], offsets: Sequence[Span]) -> MaskedChat:
        spans = _contiguous(offsets)
        labels = [IGNORE_INDEX] * len(ids)
        weights = None if set(chat.weights) <= {1} else [1.0] * len(ids)
        unstopped = 0
        token = 0
        for (start, end), weight in zip(chat.answers, chat.weights, strict=True):
            while token < len(ids) and not _carries(chat.text, spans[token], start):
                token += 1
            first = token
            while token < len(ids) and spans[token][0] < end:
                token += 1
            last, stopped = self._close(chat.text, ids, spans, first, token)
            unstopped += not stopped
            labels[first:last] = ids[first:last]
            if weights is not None:
                weights[first:last] = [weight] * (last - first)
        return MaskedChat(ids, labels, weights, unstopped, self._round_trip.loses(chat.text, ids))

    def _close(self, text: str, ids: list[int], spans: list[Span], first: int, end: int) -> tuple[int, bool]:
        """End of the answer in tokens [first, end), its stop token included, and whether it has one."""
        # A template's generation block may include the stop token and the newline after it.
        inside = end
        while inside > first and ids[inside - 1] not in self._stop_ids and _blank(text, spans[inside - 1]):
            inside -= 1
        if inside > first and ids[inside - 1] in self._stop_ids:
            return inside, True
        # Some templates put a blank between the answer and the stop token. The model must write the blank too.
        after = end
        while after < len(ids) and ids[after] not in self._special_ids and _blank(text, spans[after]):
            after += 1
        if after < len(ids) and ids[after] in self._stop_ids:
            return after + 1, True
        return end, False

    def _find_template_stop(self) -> int | None:
        """The id of the special token that the template puts after an answer, if it does."""
        text, end = self._renderer.probe_text, self._renderer.probe_answer_end
        if text is None:
            return None  # the template rejects the probe; the rows will show whether it works
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for id_, span in zip(encoded["input_ids"], _contiguous(encoded["offset_mapping"]), strict=True):
            if span[0] < end:
                continue
            if id_ in self._special_ids:
                return int(id_)
            if not _blank(text, span):
                break
        return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _contiguous(offsets: Sequence[Span]) -> list[Span]:
    """The tokens' spans without gaps: a blank outside all offsets belongs to the following token.

    Byte-level tokenizers trim blanks from the offsets, down to an empty span for a token of blanks.
    """
    spans: list[Span] = []
    reached = 0
    for start, end in offsets:
        spans.append((min(start, reached), end))
        reached = max(reached, end)
    return spans


def _carries(text: str, span: Span, start: int) -> bool:
    """Whether the token at `span` belongs to the answer that begins at `start`, or follows it.

    A token that begins in the header counts if it has more than blanks of the answer (such as " word" after a header that
    ends with a blank).
    """
    return span[0] >= start or not _blank(text, (start, span[1]))


def _blank(text: str, span: Span) -> bool:
    return not text[span[0] : span[1]].strip()
