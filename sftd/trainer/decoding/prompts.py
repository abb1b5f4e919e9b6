"""Token ids of prompts and texts of answers, with a model folder's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.spec.model_section import Model
from sftd.trainer.chat.template import BoundTemplate, Message
from sftd.trainer.chat.tokenizer import check_has_tokenizer, stop_token_ids
from sftd.trainer.errors import UserError


class Prompts:
    """`tokenizer`: transformers'. `stops`: the token ids that end an answer."""

    def __init__(self, model: Model, vocab_size: int, template: ChatTemplate | None) -> None:
        """`template` renders the prompts like the training data; None selects the model folder's template.

        Raises `UserError` for an unusable tokenizer.
        """
        # Importing transformers takes seconds. Only runs with prompts pay for it.
        from transformers import AutoTokenizer

        folder = model.partial_pretrain
        try:
            check_has_tokenizer(Path(folder))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=model.trust_remote_code
            )
            self.stops = stop_token_ids(self.tokenizer, Path(folder))
        except Exception as error:  # a broken tokenizer folder can raise anything
            raise UserError(f"the prompts need the tokenizer of {folder}: {error}") from error
        self._template, self._vocab_size = BoundTemplate(self.tokenizer, template), vocab_size

    def ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Of a user's message, or of a chat, and the generation prompt. Raises `UserError`."""
        name = f"the prompt {prompt!r}" if isinstance(prompt, str) else "the messages"
        try:
            ids = self._template.prompt_ids(prompt)
        except Exception as error:  # a chat template is a program and can raise anything
            raise UserError(f"{name} cannot be rendered: {error}") from error
        return self.checked(ids, name)

    def continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows a prompt. Raises `UserError`."""
        return self.checked(
            list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), f"the text {text!r}"
        )

    def checked(self, ids: list[int], name: str) -> list[int]:
        """The ids. Raises `UserError` if there are none, or if the model has no embedding of one."""
        if not ids or max(ids) >= self._vocab_size:
            raise UserError(f"{name} has no tokens, or tokens outside the model's vocabulary")
        return ids

    def ends(self, tokens: list[int]) -> bool:
        """Whether an answer ends with its last token."""
        return tokens[-1] in self.stops

    def text(self, tokens: list[int]) -> str:
        """Of an answer, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
