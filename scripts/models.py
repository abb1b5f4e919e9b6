"""Print docs/models.md from the families' data and the tables of tests:

python scripts/models.py > docs/models.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftd.domain.model.adapter_rules import uneven_blocks
from sftd.domain.model.families import FAMILIES
from sftd.domain.model.family import ROPE_KEYS, Family, Key
from sftd.domain.model.shape import ModelShape
from tests.builders.trainer.experts import MODEL as EXPERTS
from tests.builders.trainer.family_layouts import FIRST, LAYOUTS, refusal, spec_of
from tests.builders.trainer.tiny_models import MODELS, config_of
from tests.builders.trainer.trainers import MEGATRON
from tests.trainer.numerics import test_experts, test_layouts, test_lora, test_qlora

LLAMA = FAMILIES["LlamaForCausalLM"]
INTRODUCTION = """\
# Models

Made by `python scripts/models.py > docs/models.md` from `sftd/domain/model/families.py` and the tables of tests; a test fails when it
is out of date.

sftd reads a Hugging Face folder: config.json, safetensors, tokenizer. The first of `architectures` in config.json chooses the family;
any other is refused at submit. A new family is an entry of that file: "A dense model family" in [architecture.md](architecture.md).

In the folder of a model that sees images (config.json has a `text_config`), sftd trains the language model, on text, if the `model_type`
inside is one of the table or {also}. `sftd export` writes the whole folder: the language model under its names there, the other
weights byte for byte. An export as a PEFT folder adapts the modules of the language model only. In `model.freeze` the weights have
the names of a language model by itself.
"""
OPTIONS = """\
## Options of config.json

Every family reads {keys}, and RoPE from {rope}. The table has what else a family reads, and what all its models have. "Refused": sftd
refuses a config.json that asks for it, at submit. Other activations and RoPE scalings than the named ones are refused, too. Where
none is named, RoPE scalings are those of Llama.
"""
TESTED = """\
## What is tested

On random tiny models in FP32, for every family: logits beside transformers, loading and export bit for bit, five training steps
beside transformers (loss to 1e-5, gradient norm to 1e-4) and an answer after them. Then two packed steps on two ranks beside one
rank's padded ones: "tested", or "refused" at submit, with the reason. Of LoRA "as PEFT" is five steps beside PEFT's; "accepted" is
what no test of this family trains.
"""
DEEPER = """\
One model of some families is trained in more layouts, with validations and answers; for Llama each is padded and packed, and with each
kind of recomputation.
"""


def name_of(family: Family) -> str:
    """`Qwen3MoeForCausalLM` → Qwen3Moe."""
    return family.architecture.removesuffix("ForCausalLM")


def code(names: Any) -> str:
    """Names as code, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def table(*rows: tuple[str, ...]) -> list[str]:
    """Markdown; the first row is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def families() -> Iterator[tuple[str, ...]]:
    """Names."""
    yield "family", "`architectures`", "`model_type`", "models"
    for family in FAMILIES.values():
        yield name_of(family), f"`{family.architecture}`", f"`{family.model_type}`", family.models


def options() -> Iterator[tuple[str, ...]]:
    """What config.json may ask of each family."""
    yield "family", "all models", "reads", "activations", "RoPE scalings", "refused"
    for family in FAMILIES.values():
        refused = {option.key for option in family.refused}
        fixed = {name: how for name, how in family.fields.items() if not isinstance(how, Key)}
        always = (name if value is True else f"{name}: {value}" for name, value in fixed.items())
        own = (key for key in family.config_keys() if key not in LLAMA.config_keys() and key not in refused)
        scalings = [kind for kind in family.rope_types if kind != "default"]
        is_other = family is LLAMA or family.rope_types != LLAMA.rope_types
        yield (
            name_of(family),
            code(always),
            code(own),
            code(family.activations),
            code(scalings) if is_other else "",
            code(option.key for option in family.refused),
        )


def tested() -> Iterator[tuple[str, ...]]:
    """Layouts and adapters of each family."""
    as_peft = {MODELS[name][0] for name in test_lora.PEFT}
    in_four_bits = {MODELS[name][0] for name, _, _ in test_qlora.LAYOUTS.values()}
    lora: dict[str, Any] = {"model__lora__rank": 4}
    qlora = lora | {"model__quantize": "nf4"}
    yield "family", *LAYOUTS, "LoRA", "QLoRA"
    for architecture, family in FAMILIES.items():
        shape = FAMILIES[architecture].shape(config_of(FIRST[architecture]).to_dict(), {})
        cells = ["refused" if refusal(shape, keys) else "tested" for keys in LAYOUTS.values()]
        # The tiny model's matrices are too narrow for blocks of four bits.
        narrow = list(uneven_blocks(spec_of(qlora), shape))
        for keys, known, word in ((lora, as_peft, "as PEFT"), (qlora, in_four_bits, "tested")):
            accepted = word if architecture in known else "accepted"
            cells.append("refused" if [p for p in refusal(shape, keys) if p not in narrow] else accepted)
        yield name_of(family), *cells


def words(ranks: int, keys: dict[str, Any]) -> str:
    """A layout in words."""
    short = {
        "tensor_model": "TP",
        "pipeline_model": "PP",
        "virtual_pipeline_model": "VPP",
        "context": "CP",
        "expert_model": "EP",
    }
    sizes = {
        kind: keys[key] for name, kind in short.items() if (key := f"{MEGATRON}{name}_parallel_size") in keys
    }
    found = [f"{kind} {size}" for kind, size in sizes.items()]
    if MEGATRON + "sequence_parallel" in keys:
        found.append("SP")
    split = sizes.get("TP", 1) * sizes.get("PP", 1) * sizes.get("CP", 1)
    if ranks > split:
        found.append(f"DP {ranks // split}")
    if "training__use_rmpad" in keys:
        found.append("packed")
    if "model__enable_gradient_checkpointing" in keys:
        found.append("recomputed")
    return " + ".join(found or ["one rank"])


def deeper() -> Iterator[tuple[str, ...]]:
    """The layouts of single models."""
    yield "what", "model", "layouts"
    every = [("full fine-tuning", "llama_tied", ranks, keys) for ranks, keys in test_layouts.LAYOUTS.values()]
    every += [("full fine-tuning", EXPERTS, ranks, keys) for ranks, keys in test_experts.LAYOUTS.values()]
    for base, ranks, keys in test_lora.LAYOUTS.values():
        what = "frozen weights" if base == "frozen" else "LoRA"
        every.append((what, test_lora.ONE[base][0], ranks, keys))
    every += [("QLoRA", model, ranks, keys) for model, ranks, keys in test_qlora.LAYOUTS.values()]
    found: dict[tuple[str, str], list[str]] = {}
    for what, model, ranks, keys in every:
        found.setdefault((what, name_of(FAMILIES[MODELS[model][0]])), []).append(words(ranks, keys))
    for (what, family), layouts in found.items():
        yield what, family, "; ".join(dict.fromkeys(layouts))


def meanings() -> Iterator[str]:
    """The paragraphs on the fields of a shape."""
    _, *paragraphs = cleandoc(ModelShape.__doc__ or "").split("\n\n")
    for paragraph in paragraphs:
        yield paragraph
        yield ""


def markdown() -> str:
    """The whole page."""
    keys = [key for key in LLAMA.config_keys() if key not in {option.key for option in LLAMA.refused}]
    also = ", ".join(f"`{name}`" for family in FAMILIES.values() for name in family.also_inside)
    lines = [INTRODUCTION.format(also=also), *table(*families())]
    lines += [OPTIONS.format(keys=code(keys), rope=code(ROPE_KEYS)), *table(*options())]
    lines += [
        "The names of the second column are those of sftd's own description of a model:",
        "",
        *meanings(),
    ]
    lines += [TESTED, *table(*tested()), DEEPER, *table(*deeper())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
