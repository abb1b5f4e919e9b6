"""Whether a tokenizer keeps the text that it is given, so that the model reads what the rows say."""

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sftd.trainer.chat.errors import PrepareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 30  # characters that a message shows from the first one that is lost


class RoundTrip:
    """Decodes texts again. What a normaliser of the tokenizer declares, such as lower case, is not a loss, and neither are
    the blanks beside added tokens, which those may claim."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer: Any = tokenizer
        # The wrapper's own token may be another's, such as the end of text, and then says nothing.
        backend = tokenizer.backend_tokenizer
        unknown = getattr(backend.model, "unk_token", tokenizer.unk_token)
        self._unknown: int | None = None if unknown is None else backend.token_to_id(unknown)
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def loses(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the vocabulary lacks characters of the text that the ids were made of.

        Raises PrepareError when ASCII is lost, which every vocabulary has: the tokenizer does not work.
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
        # Tokenizers of sentencepiece's kind write blanks as ▁.
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
        f"transformers {transformers.__version__} does not read the tokenizer's files as they are meant. Install the "
        "version that sftd's constraints.txt names, or correct tokenizer_class in tokenizer_config.json."
    )
