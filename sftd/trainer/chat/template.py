"""Renders messages with a tokenizer's chat template. Everything that changes the text, such as the date, is fixed."""

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
# Variables that each row passes to the chat template.
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})


def marks_answers(template: str) -> bool:
    """Whether a template's text marks the model's answers."""
    return bool(_GENERATION_BLOCK.search(template))


class BoundTemplate:
    """The chat template or templates of one tokenizer, as `chosen`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chosen: ChatTemplate | None = None) -> None:
        self.chosen = chosen or ChatTemplate()
        self._tokenizer = tokenizer
        self._now = dt.datetime.combine(dt.date.fromisoformat(self.chosen.date), dt.time())

    @property
    def sources(self) -> dict[str, str]:
        """Name → text of the templates for rows."""
        if self.chosen.text is not None:
            return {"default": self.chosen.text}
        templates = self._tokenizer.chat_template or {}
        if not isinstance(templates, dict):
            templates = {"default": str(templates)}
        name = self.chosen.name
        return dict(templates) if name is None else {name: templates[name]} if name in templates else {}

    def name(self, tools: list[Any] | None = None) -> str:
        """Name of the template for a chat: the chosen one, or else by transformers' rule. Raises ChatError."""
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
        """Whether a template uses the current date, so that `chosen.date` matters."""
        return any(_CLOCK in text for text in self.sources.values())

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the template's text, or of several the one for chats without tools."""
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
        """The text of a chat. Raises ChatError when the template rejects it."""
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
        except Exception as error:  # a template is a program and can raise anything
            raise ChatError(_refusal(error)) from error
        return str(text)

    def render_marked(
        self, messages: Sequence[Message], tools: list[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a chat, and the character spans that the template marks as the assistant's. Raises ChatError."""
        # apply_chat_template returns a token mask, which loses an answer that begins with a blank. The character spans
        # are exact.
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

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a user's message, or of a chat, and the generation prompt; of the bare text without a template. Raises
        ChatError."""
        if isinstance(prompt, str):
            if not self.sources and not self.chosen.name:
                return list(self._tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        text = self.render(prompt, add_generation_prompt=True)
        # The template's text has all special tokens, so the tokenizer must not add its own.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prepared(self, tools: list[Any] | None) -> str:
        """The template's text, with its clock fixed to the chosen date."""
        text = self.source(tools)
        if _CLOCK in text:
            # transformers caches compiled templates and gives each a global function for today's date. A variable cannot
            # replace it, so this replaces the global, each time, because the cache may have dropped the template.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(text).globals[_CLOCK] = self._now.strftime
        return text


def check_template(template: BoundTemplate, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise PrepareError when the model folder lacks the template, or when the template does not use a chosen variable or
    the chosen date, which would silently have no effect."""
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
            f"The chat template {where} does not use the current date, so --date has no effect. Leave it out. If the date is "
            "a variable of the template, set it with --template-arg."
        )
    known = _variables("\n".join(sources.values()))
    for name in chosen.arguments:
        if name in _GIVEN:
            raise PrepareError(
                f"The prepare tool sets the template's variable {name!r} itself. Leave it out."
            )
        if name not in known:
            raise PrepareError(
                f"The chat template {where} has no variable {name!r}. Remove it, or correct its spelling."
            )


def _variables(template: str) -> set[str]:
    """The names in a template that are not attributes. Uses the lexer only, because transformers adds tags that Jinja cannot
    parse."""
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
