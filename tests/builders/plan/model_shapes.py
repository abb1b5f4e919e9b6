"""Shapes of well-known models, and one that is small enough to count on paper."""

from __future__ import annotations

import msgspec

from sftd.domain.model.shape import ModelShape

LLAMA_1B = ModelShape(
    architecture="LlamaForCausalLM",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
    attention_bias=False,
    qk_norm=False,
)
replace = msgspec.structs.replace
LLAMA_7B = replace(
    LLAMA_1B,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    tie_word_embeddings=False,
)
LLAMA_3B = replace(LLAMA_1B, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
QWEN_600M = replace(
    LLAMA_1B,
    architecture="Qwen3ForCausalLM",
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    head_dim=128,
    vocab_size=151936,
    qk_norm=True,
)
SMOLLM_135M = replace(
    LLAMA_1B,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
)
# Small enough to count on paper: two experts of a token's four, with a norm of queries and keys.
EXPERTS = replace(
    LLAMA_1B,
    architecture="Qwen3MoeForCausalLM",
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=11,
    tie_word_embeddings=False,
    qk_norm=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
)
