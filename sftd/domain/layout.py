"""What must fit together between the spec, the model and the data. Pure: the facts are passed in."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.errors import Problem
from sftd.domain.spec import Spec

# Hugging Face architectures that the trainer has a weight mapping for.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPE_SCALINGS = ("default", "llama3")


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's config.json says of its shape. `attention_bias` is on the QKV projections; `sliding_window` is how
    many tokens back attention looks, None for all."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    hidden_act: str = "silu"
    sliding_window: int | None = None
    mlp_bias: bool = False


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in data files. `truncated` rows are longer than the sequence length; `unusable` rows have no
    trained label within it. Lengths are tokens."""

    files: list[str]
    digest: str
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    unusable: int

    @property
    def usable(self) -> int:
        """Rows that training sees."""
        return self.rows - self.unusable


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
    if shape.architecture not in ARCHITECTURES:
        problems.append(
            Problem(
                "model.partial_pretrain",
                f"architecture {shape.architecture} has no weight mapping",
                "use a model of one of: " + ", ".join(ARCHITECTURES),
            )
        )
    if shape.mlp_bias or (shape.attention_bias and shape.architecture != "Qwen2ForCausalLM"):
        problems.append(
            Problem(
                "model.partial_pretrain",
                f"config.json has {'mlp_bias' if shape.mlp_bias else 'attention_bias'}, which {shape.architecture} "
                "is not trained with here",
                "use a model without these biases",
            )
        )
    if shape.hidden_act != "silu":
        problems.append(
            Problem(
                "model.partial_pretrain",
                f"config.json has hidden_act {shape.hidden_act!r}",
                "use a model with silu (SwiGLU) layers",
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
    rope = (shape.rope_scaling or {}).get("rope_type", (shape.rope_scaling or {}).get("type", "default"))
    if rope not in _ROPE_SCALINGS:
        problems.append(
            Problem(
                "model.partial_pretrain", f"RoPE scaling {rope!r} is not known", "use default or llama3 RoPE"
            )
        )
    for what, number in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_key_value_heads),
        ("FFN units", shape.intermediate_size),
    ):
        if number % tp:
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


def _divisors(shape: ModelShape) -> str:
    numbers = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    return ", ".join(str(n) for n in range(1, 65) if all(x % n == 0 for x in numbers))


def check_data(spec: Spec, train: DataFacts, val: DataFacts | None) -> tuple[list[Problem], list[Problem]]:
    """Whether there is enough data, and what of it is not used. Returns (problems, warnings)."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for where, facts in (("data.train_files", train), ("data.val_files", val)):
        if facts is None:
            continue
        if facts.usable == 0:
            problems.append(
                Problem(
                    where,
                    f"none of the {facts.rows} rows has a trained label (≠ -100) within {spec.data.sequence_length} tokens",
                    "check the masks that `sftd prepare` made, or raise data.sequence_length",
                )
            )
        elif facts.unusable:
            warnings.append(
                Problem(where, f"{facts.unusable} of {facts.rows} rows have no trained label and are dropped")
            )
        if facts.truncated:
            text = f"{facts.truncated} of {facts.rows} rows are longer than data.sequence_length {spec.data.sequence_length}"
            if spec.data.truncation == "error":
                mend = f"raise data.sequence_length to {facts.longest}, or set data.truncation to right"
                problems.append(Problem(where, text, mend))
            else:
                warnings.append(Problem(where, f"{text} and are truncated ({spec.data.truncation})"))
    return problems, warnings
