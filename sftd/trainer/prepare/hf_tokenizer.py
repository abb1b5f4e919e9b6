"""Loads a model folder's tokenizer and names what identifies it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sftd.trainer.prepare.errors import PrepareError

# What a chat template is given of each row.
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model folder, without the network.

    Raises PrepareError when it cannot be loaded, reports no character offsets or has no chat template.
    """
    if not folder.is_dir():
        raise PrepareError(f"There is no model folder {folder}. Give the folder with the model's tokenizer.")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # many kinds, by tokenizer family; all of them are about the folder's files
        hint = (
            "" if trust_remote_code else " If it comes with Python code of its own, pass --trust-remote-code."
        )
        raise PrepareError(
            f"The tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error}).{hint}"
        ) from error
    if not tokenizer.is_fast:
        raise PrepareError(
            f"The tokenizer in {folder} does not report character offsets, so the answers' tokens cannot be "
            "found. Convert it to a tokenizer.json."
        )
    if not tokenizer.chat_template:
        raise PrepareError(
            f"The tokenizer in {folder} has no chat template. Copy chat_template.jinja (or the tokenizer "
            "files) of the instruction-tuned version of the model into the folder."
        )
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 (hex) of the tokenizer's vocabulary, merges, added tokens and text processing."""
    serialised = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(serialised.encode()).hexdigest()


def chat_template_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 (hex) of the text of the chat template in use."""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def check_template_args(tokenizer: "PreTrainedTokenizerBase", folder: Path, names: Iterable[str]) -> None:
    """Raises PrepareError for a variable that the chat template does not have, for it would change nothing, without a word;
    and for one that each row gives it."""
    templates = tokenizer.chat_template
    known = _variables("\n".join(templates.values()) if isinstance(templates, dict) else str(templates))
    for name in names:
        if name in _GIVEN:
            raise PrepareError(
                f"The template's variable {name!r} is what prepare itself gives it. Leave it out."
            )
        if name not in known:
            raise PrepareError(
                f"The chat template in {folder} has no variable {name!r}. Take it out, or see how it is spelt there."
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


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> set[int]:
    """The ids at which generation ends: the tokenizer's end of sequence and the generation config's."""
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise PrepareError(f"{path} is not a JSON object ({error}). Download the model again.") from error
        ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return ids
