"""The language model of a vision-language checkpoint: `text_config` of its config.json, and weights with other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.peft import PREFIX

# Before the names of its weights, in files; what the names of a language model by itself have there.
_INSIDE = (("model.language_model.", "model."), ("language_model.", ""))
_KIND, _TIED = "model_type", "tie_word_embeddings"


def is_vision_language(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has that of a language model inside."""
    return isinstance(config.get("text_config"), dict)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config.json with its family's architecture, if `config` is of a vision-language model around a
    supported one; else `config` itself."""
    if not is_vision_language(config):
        return config
    text: dict[str, Any] = config["text_config"]
    kind = text.get(_KIND)
    family = next((f for f in FAMILIES.values() if kind in (f.model_type, *f.also_inside)), None)
    if family is None:
        return config
    found = text | {"architectures": [family.architecture]}
    # transformers 5 writes it outside, transformers 4 inside.
    tied = [part[_TIED] for part in (config, text) if _TIED in part]
    return found | {_TIED: any(tied)} if tied else found


def with_text(config: dict[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A vision-language config.json whose language model has these keys changed."""
    outside = {_TIED: changed[_TIED]} if _TIED in changed else {}
    return config | {"text_config": config["text_config"] | changed} | outside


def text_name(name: str) -> str:
    """Name of a weight as the language model by itself has it: of one that is inside, else `name`. In a PEFT folder, too."""
    before = PREFIX if name.startswith(PREFIX) else ""
    rest = name.removeprefix(before)
    for inside, alone in _INSIDE:
        if rest.startswith(inside):
            return before + alone + rest.removeprefix(inside)
    return name


def name_in_peft(name: str) -> str:
    """The name that the weight `name` of a language model inside has for peft, which sees transformers' modules."""
    return name.replace("model.", "model.language_model.", 1)
