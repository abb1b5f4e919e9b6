"""What is known of a model and of data files: a model's shape, and what rows hold."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.errors import Problem, shorten

# Hugging Face architectures that the trainer has a weight mapping for.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's config.json says of its shape. `attention_bias` is on the QKV projections; `sliding_window` is how
    many tokens back attention looks, None for all.

    A mixture of experts (MoE) has `num_experts` in every layer, each of `moe_intermediate_size` units, of which a token
    takes `num_experts_per_tok`, weighted by their softmax over all experts, or, with `norm_topk_prob`, over the taken
    ones. `unsupported` names what config.json asks for that the trainer does not compute."""

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
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    unsupported: tuple[str, ...] = ()


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
    if name in ARCHITECTURES:
        return None
    what = f"{shorten(name)} is not supported" if name else "config.json names no architecture"
    return Problem("model.partial_pretrain", what, "supported: " + ", ".join(ARCHITECTURES))
