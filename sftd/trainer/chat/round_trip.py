"""Checks that a tokenizer keeps the text of the rows."""

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sftd.trainer.chat.errors import PrepareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 30  # number of characters shown from the first lost one


class RoundTrip:
    """Decodes token ids and compares the text. Changes by the tokenizer's normaliser, such as lower case, are no loss, nor
    are blanks beside added tokens, which may absorb them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer: Any = tokenizer
        # Prefer the backend's unknown token: the wrapper's may be another token, such as the end of text.
        backend = tokenizer.backend_tokenizer
        unknown = getattr(backend.model, "unk_token", tokenizer.unk_token)
        self._unknown: int | None = None if unknown is None else backend.token_to_id(unknown)
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def loses(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the vocabulary lacks characters of `text`. `ids` are its tokens.

        Raises PrepareError when ASCII is lost: every vocabulary has it, so the tokenizer is broken.
        """
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded == text:
            return False
        pairs = list(itertools.zip_longest(self._added.split(text), self._added.split(decoded), fillvalue=""))
        lost = [(given, found) for given, found in pairs if self._normal(given) != self._normal(found)]
        if lost and self._unknown not in ids:
            for given, found in lost:
                if _ascii(self._normal(given)) != _ascii(self._normal(found)):
                    raise PrepareError(_lost(given.strip(), found.strip()))
        return bool(lost)

    def _normal(self, text: str) -> str:
        # SentencePiece tokenizers write blanks as ▁.
        text = text.replace("▁", " ").strip()
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode().strip()


def _lost(given: str, found: str) -> str:
    import transformers

    same = next(
        (place for place, (a, b) in enumerate(zip(given, found, strict=False)) if a != b),
        min(len(given), len(found)),
    )
    start = max(0, same - _AROUND // 2)
    return (
        f"The tokenizer loses characters: of {given[start : same + _AROUND]!r} it leaves {found[start : same + _AROUND]!r}. "
        f"transformers {transformers.__version__} misreads the tokenizer's files. Install the "
        "version that sftd's constraints.txt names, or correct tokenizer_class in tokenizer_config.json."
    )
