"""Renders messages with a tokenizer's chat template, of which everything that changes the text is fixed."""

import datetime as dt
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftd.domain.data.chat_template import DEFAULT_DATE, ChatTemplate
from sftd.trainer.chat.errors import ChatError, PrepareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end), in characters or in tokens

_CLOCK = "strftime_now"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a chat template is given of each row.
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})


def marks_answers(template: str) -> bool:
    """Whether a template's text marks what the model writes."""
    return bool(_GENERATION_BLOCK.search(template))


class BoundTemplate:
    """The chat template or templates of one tokenizer, as `chosen`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chosen: ChatTemplate | None = None) -> None:
        self.chosen = chosen or ChatTemplate()
        self._tokenizer = tokenizer
        self._now = dt.datetime.combine(dt.date.fromisoformat(self.chosen.date), dt.time())

    @property
    def sources(self) -> dict[str, str]:
        """Name → text of the templates that rows may be rendered with."""
        if self.chosen.text is not None:
            return {"default": self.chosen.text}
        templates = self._tokenizer.chat_template or {}
        if not isinstance(templates, dict):
            templates = {"default": str(templates)}
        name = self.chosen.name
        return dict(templates) if name is None else {name: templates[name]} if name in templates else {}

    def name(self, tools: list[Any] | None = None) -> str:
        """Name of the template for a chat, by transformers' rule unless one was chosen. Raises ChatError."""
        sources = self.sources
        name = self.chosen.name or ("tool_use" if tools and "tool_use" in sources else "default")
        if name in sources:
            return name
        if self.chosen.name:
            raise ChatError(f"the model folder has no chat template named {name!r}")
        raise ChatError(
            f"the model has chat templates with the names {', '.join(sorted(sources)) or '(none)'}, and none is "
            "the default. Choose one with --template NAME"
        )

    def source(self, tools: list[Any] | None = None) -> str:
        """Text of the template for a chat. Raises ChatError."""
        return self.sources[self.name(tools)]

    @property
    def asks_for_date(self) -> bool:
        """Whether a template writes the current date, so that `chosen.date` matters."""
        return any(_CLOCK in text for text in self.sources.values())

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the template's text; of several, of that for chats without tools."""
        sources = self.sources
        text = sources.get("default") or "".join(sources[name] for name in sorted(sources))
        return hashlib.sha256(text.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a chat. Raises ChatError when the template refuses it."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._prepared(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chosen.arguments,
            )
        except ChatError:
            raise
        except Exception as error:  # a template is a program of its own; it can fail in any way
            raise ChatError(_refusal(error)) from error
        return str(text)

    def render_marked(
        self, messages: Sequence[Message], tools: list[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a chat, and the spans of characters that the template marks as the assistant's. Raises ChatError."""
        # apply_chat_template gives this mask by tokens, but loses an answer that begins with a blank;
        # the characters' spans, which it computes it from, are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations are wrong
        try:
            texts, marked = render(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                tools=tools,
                chat_template=self._prepared(tools),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self.chosen.arguments},
            )
        except ChatError:
            raise
        except Exception as error:
            raise ChatError(_refusal(error)) from error
        return str(texts[0]), list(marked[0])

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user's message and the generation prompt; without a template, of the bare text. Raises ChatError."""
        if not self.sources and not self.chosen.name:
            return list(self._tokenizer(prompt)["input_ids"])
        text = self.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        # The template has written all special tokens, so the tokenizer must not add its own.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prepared(self, tools: list[Any] | None) -> str:
        """The template's text, its clock stopped."""
        text = self.source(tools)
        if _CLOCK in text:
            # transformers compiles a template once and gives it a function of today's date. It passes no function through
            # as a variable, so the compiled template's own global is replaced; its cache may forget, hence each time.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(text).globals[_CLOCK] = self._now.strftime
        return text


def check_template(template: BoundTemplate, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises PrepareError when the model folder has no template (of the chosen name), or the template does not have a
    chosen variable or ask for the chosen date, which would then change nothing, without a word."""
    chosen, sources = template.chosen, template.sources
    if not sources:
        named = tokenizer.chat_template
        if chosen.name is not None and named:
            has = ", ".join(sorted(named)) if isinstance(named, dict) else "only the default"
            raise PrepareError(
                f"The model folder {folder} has no chat template named {chosen.name!r}; it has {has}. Leave --template "
                "out, or name one of these."
            )
        raise PrepareError(
            f"The tokenizer in {folder} has no chat template, as is usual for base models. Give one with "
            "--chat-template FILE, such as the chat_template.jinja of the instruction-tuned version of the model."
        )
    where = "given" if chosen.text is not None else f"in {folder}"
    if chosen.date != DEFAULT_DATE and not template.asks_for_date:
        raise PrepareError(
            f"The chat template {where} does not ask for the current date, so --date changes nothing. Leave it out; a date "
            "that is a variable of the template is set with --template-arg."
        )
    known = _variables("\n".join(sources.values()))
    for name in chosen.arguments:
        if name in _GIVEN:
            raise PrepareError(
                f"The template's variable {name!r} is what prepare itself gives it. Leave it out."
            )
        if name not in known:
            raise PrepareError(
                f"The chat template {where} has no variable {name!r}. Take it out, or see how it is spelt there."
            )


def _variables(template: str) -> set[str]:
    """The names in a template that are no field of anything. Its words are looked at, not its grammar: templates have tags
    that are transformers' own."""
    import jinja2

    words = [
        (kind, word)
        for _, kind, word in jinja2.Environment(autoescape=True).lex(template)
        if kind != "whitespace"
    ]
    return {
        word
        for before, (kind, word) in zip([("", ""), *words], words, strict=False)
        if kind == "name" and before != ("operator", ".")
    }


def _refusal(error: Exception) -> str:
    return f"the model's chat template refuses it ({type(error).__name__}: {error})"
