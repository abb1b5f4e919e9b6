"""What must fit together between the spec, the model and the data. Pure: the facts are passed in."""

from __future__ import annotations

import msgspec

from sftd.domain.errors import Problem, quote, several, shorten
from sftd.domain.model.families import FAMILIES
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec

# Where `DataFacts.lengths` are taken: finer at the long end, which decides about padding.
LENGTH_QUANTILES = (*(i / 32 for i in range(32)), *(1 - 2**-k for k in range(6, 13)), 1.0)


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in data files. `truncated` rows are longer than the sequence length; `unusable` rows have no
    trained label within it, and `unusable_rows` numbers the first of them, from 0 over all files. Lengths are tokens.

    Of the rows that training sees, as it sees them: `seen_tokens` with Σ n² = `seen_squares`, `lengths` at
    `LENGTH_QUANTILES`, and the `stopping` ones, in which a token is trained that ends an answer (None where that token is not
    known). `remarks` are what a person should know of the files, a sentence each. Logs of older versions lack these.
    """

    files: list[str]
    digest: str
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    unusable: int
    unusable_rows: tuple[int, ...] = ()
    seen_tokens: int = 0
    seen_squares: int = 0
    lengths: tuple[int, ...] = ()
    stopping: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Rows that training sees."""
        return self.rows - self.unusable


def check_architecture(name: str) -> Problem | None:
    """Whether models of this architecture, as config.json names it, are trained; empty is none named."""
    if name in FAMILIES:
        return None
    what = f"{shorten(name)} is not supported" if name else "config.json names no architecture"
    return Problem("model.partial_pretrain", what, "supported: " + ", ".join(FAMILIES))


def check_model(spec: Spec, shape: ModelShape) -> tuple[list[Problem], list[Problem]]:
    """Whether the model can be laid out as the spec says. Returns (problems, warnings)."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    m = spec.model.megatron
    tp, pp, vpp = (
        m.tensor_model_parallel_size,
        m.pipeline_model_parallel_size,
        m.virtual_pipeline_model_parallel_size or 1,
    )
    family = FAMILIES[shape.architecture]
    problems.extend(
        Problem(
            "model.partial_pretrain",
            f"config.json has {what}, which {shape.architecture} is not trained with here",
            "use a model without it",
        )
        for what in shape.unsupported
    )
    problems += _check_experts(spec, shape)
    if shape.hidden_act not in family.activations:
        problems.append(
            Problem(
                "model.partial_pretrain",
                f"config.json has hidden_act {quote(shape.hidden_act)}",
                f"use a model with {' or '.join(family.activations)} layers",
            )
        )
    if shape.sliding_window is not None and spec.data.sequence_length > shape.sliding_window:
        problems.append(
            Problem(
                "data.sequence_length",
                f"{spec.data.sequence_length} is more than the {shape.sliding_window} tokens of the model's sliding window",
                f"set it to {shape.sliding_window} or less",
            )
        )
    if shape.rope_type not in family.rope_types:
        problems.append(
            Problem(
                "model.partial_pretrain",
                f"RoPE scaling {quote(shape.rope_type)} is not known",
                f"use {' or '.join(family.rope_types)} RoPE",
            )
        )
    for what, number in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_key_value_heads),
        ("FFN units", _ffn_units(shape)),
    ):
        # With expert parallelism a rank holds experts whole.
        is_whole = what == "FFN units" and m.expert_model_parallel_size > 1
        if number % tp and not is_whole:
            problems.append(
                Problem(
                    "model.megatron.tensor_model_parallel_size",
                    f"{tp} does not divide the model's {number} {what}",
                    f"use one of {_divisors(shape)}",
                )
            )
    if shape.num_hidden_layers % (pp * vpp):
        key = "virtual_pipeline_model_parallel_size" if vpp > 1 else "pipeline_model_parallel_size"
        problems.append(
            Problem(
                f"model.megatron.{key}",
                f"PP {pp} × VPP {vpp} = {pp * vpp} does not divide the model's {shape.num_hidden_layers} layers",
                "use sizes whose product divides the layers",
            )
        )
    if spec.data.sequence_length > shape.max_position_embeddings:
        warnings.append(
            Problem(
                "data.sequence_length",
                f"{spec.data.sequence_length} is more than the {shape.max_position_embeddings} positions the model was trained on",
            )
        )
    return problems, warnings


def _check_experts(spec: Spec, shape: ModelShape) -> list[Problem]:
    problems: list[Problem] = []
    m = spec.model.megatron
    ep, where = m.expert_model_parallel_size, "model.megatron.expert_model_parallel_size"
    if not shape.num_experts:
        if ep > 1:
            what = f"{ep}, but {shape.architecture} has no experts to share"
            problems.append(Problem(where, what, "set it to 1"))
        return problems
    # Of a single expert whose weight is normalised to 1, the router would learn nothing.
    least = 2 if shape.norm_topk_prob else 1
    if not least <= shape.num_experts_per_tok <= shape.num_experts:
        what = f"config.json gives a token {shape.num_experts_per_tok} of {shape.num_experts} experts"
        fix = f"use a model with {least} to {shape.num_experts} (num_experts_per_tok)"
        problems.append(Problem("model.partial_pretrain", what, fix))
    if shape.num_experts % ep:
        sizes = ", ".join(str(n) for n in range(1, shape.num_experts + 1) if shape.num_experts % n == 0)
        what = f"{ep} does not divide the model's {shape.num_experts} experts"
        problems.append(Problem(where, what, f"use one of {sizes}"))
    if m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        problems.append(
            Problem(
                "model.megatron.sequence_parallel",
                "is off, but experts are trained only with each tensor-parallel rank holding its own part of the "
                "sequence: otherwise all of them would send the same tokens to the experts",
                "turn it on, or set model.megatron.tensor_model_parallel_size to 1",
            )
        )
    return problems


def _ffn_units(shape: ModelShape) -> int:
    return shape.moe_intermediate_size if shape.num_experts else shape.intermediate_size


def _divisors(shape: ModelShape) -> str:
    numbers = (shape.num_attention_heads, shape.num_key_value_heads, _ffn_units(shape))
    return ", ".join(str(n) for n in range(1, 65) if all(x % n == 0 for x in numbers))


def check_data(spec: Spec, train: DataFacts, val: DataFacts | None) -> tuple[list[Problem], list[Problem]]:
    """Whether there is enough data, and what of it is not used. Returns (problems, warnings)."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for where, facts in (("data.train_files", train), ("data.val_files", val)):
        if facts is None:
            continue
        warnings += [Problem(where, remark) for remark in facts.remarks]
        if facts.usable == 0:
            problems.append(
                Problem(
                    where,
                    f"{several(facts.files)}: none of the {facts.rows} rows has a trained label (≠ -100) within "
                    f"{spec.data.sequence_length} tokens",
                    "check the masks that `sftd prepare` made, or raise data.sequence_length",
                )
            )
        elif facts.unusable:
            rows = ", ".join(map(str, facts.unusable_rows))
            more = facts.unusable - len(facts.unusable_rows)
            which = f" (rows {rows}{f' and {more} more' if more > 0 else ''}, from 0)" if rows else ""
            warnings.append(
                Problem(
                    where,
                    f"{facts.unusable} of {facts.rows} rows have no trained label and are dropped{which}",
                )
            )
        if facts.stopping == 0 and facts.usable:
            warnings.append(
                Problem(
                    where,
                    "no row trains a token that ends an answer: the model will not learn to stop",
                    "have the labels include the end of each answer, as `sftd prepare` does",
                )
            )
        if facts.truncated:
            text = f"{facts.truncated} of {facts.rows} rows are longer than data.sequence_length {spec.data.sequence_length}"
            if spec.data.truncation == "error":
                fix = f"raise data.sequence_length to {facts.longest}, or set data.truncation to right"
                problems.append(Problem(where, text, fix))
            else:
                warnings.append(Problem(where, f"{text} and are truncated ({spec.data.truncation})"))
    return problems, warnings
