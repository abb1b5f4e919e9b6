"""Loads a model folder's tokenizer, and computes its digest and stop tokens."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sftd.trainer.chat.errors import PrepareError
from sftd.wire.model.folder import has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model folder, without the network.

    Raises PrepareError when it is missing, cannot be loaded, or reports no character offsets.
    """
    if not folder.is_dir():
        raise PrepareError(f"There is no model folder {folder}. Give the folder with the model's tokenizer.")
    check_has_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the type depends on the tokenizer family; the cause is in the folder's files
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
    return tokenizer


def check_has_tokenizer(folder: Path) -> None:
    """Raise PrepareError for a model folder without a tokenizer, for which transformers would create an empty one."""
    if not has_tokenizer(folder):
        raise PrepareError(
            f"The model folder {folder} has no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json. "
            "Use a model folder that has the tokenizer's files of the same model."
        )


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 (hex) of the tokenizer's vocabulary, merges, added tokens and text processing."""
    serialised = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(serialised.encode()).hexdigest()


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> set[int]:
    """The token ids that end generation, from the tokenizer and the generation config."""
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise PrepareError(f"{path} is not a JSON object ({error}). Download the model again.") from error
        ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return ids
