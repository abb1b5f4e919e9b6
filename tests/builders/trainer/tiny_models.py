"""Tiny random models of each family with data for them, and the folder of a real one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

VOCAB = 250
TRAIN_ROWS = 37
PROMPT = "abc"
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 1,
    # Five times the usual, so that attention is far from uniform and an error in it shows.
    "initializer_range": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
_SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DELTA_NETS: dict[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "initializer_range": 0.05,
    "pad_token_id": 0,
}
# Name → (transformers model, config, what its config gets besides the sizes).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "llama3_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": False, "rope_parameters": _LLAMA3},
    ),
    "yarn_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": False, "rope_parameters": _YARN},
    ),
    "linear_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    # Longer than what the model was trained with.
    "dynamic_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "proportional_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "proportional",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    # Windows shorter than the sequences, in all layers and in the last two.
    "mistral_window": (
        "MistralForCausalLM",
        "MistralConfig",
        {"sliding_window": 16, "num_hidden_layers": 2, "tie_word_embeddings": False},
    ),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": False, "head_dim": 32}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {"tie_word_embeddings": True, "no_rope_layer_interval": 3, "pad_token_id": 0},
    ),
    # Layer 1 has attention; three values for each key of the delta nets.
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _DELTA_NETS),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.0,
            "initializer_range": 0.2,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {"tie_word_embeddings": False}),
    "olmo3": (
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 32, "pad_token_id": 0}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "ministral": (
        "MinistralForCausalLM",
        "MinistralConfig",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        "Ministral3Config",
        {
            "head_dim": 32,
            # Its default is a token of the rows, whose embedding transformers would not train.
            "pad_token_id": 0,
            "initializer_range": 0.2,
            "rope_parameters": _YARN
            | {
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "max_position_embeddings": 256,
            },
        },
    ),
    # Llama 2 has a key and a value for every head; the odd vocabulary is padded when two ranks share it.
    "llama2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "vocab_size": VOCAB + 1},
    ),
    "qwen2_untied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "initializer_range": 0.1},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 16,
            "num_hidden_layers": 2,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,
        },
    ),
    # Weights of the taken experts that do not sum to one.
    "qwen3_moe_plain": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "initializer_range": 0.1,
        },
    ),
    # A gated shared expert; a dense layer.
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [0],
            "initializer_range": 0.1,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        _DELTA_NETS
        | {
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _DELTA_NETS
        | {
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _SIGMOID | {"use_qk_norm": True, "attention_bias": True},
    ),
    # Latent queries, a value narrower than its key, groups of experts, YaRN in the scale of attention.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SIGMOID
        | _LATENT
        | {
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    # Moonlight's shape: queries from the hidden state; weights of the experts that do not sum to one.
    "moonlight": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SIGMOID
        | _LATENT
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        _SIGMOID | _LATENT | {"q_lora_rank": 24, "v_head_dim": 24},
    ),
}


_EYES = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 4}
_QWEN_EYES = _EYES | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
_SMALL_EYES = _EYES | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
# Vision-language models, with a language model of a family inside.
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5_vision": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": MODELS["qwen3_5"][2], "vision_config": _QWEN_EYES},
    ),
    "qwen3_vision": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": MODELS["qwen3"][2] | {"pad_token_id": 0},
            "vision_config": _QWEN_EYES | {"deepstack_visual_indexes": [0]},
        },
    ),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": MODELS["gemma3"][2],
            "vision_config": _SMALL_EYES | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3_vision": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": MODELS["mistral"][2] | {"model_type": "mistral"},
            "vision_config": _SMALL_EYES | {"model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
    ),
}
_WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": False}
# Models whose matrices two ranks can share in blocks of 64 columns.
WIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _WIDE),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _WIDE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "head_dim": 32,
            "norm_topk_prob": True,
            "initializer_range": 0.1,
        },
    ),
}


def config_of(name: str, models: Mapping[str, tuple[str, str, dict[str, Any]]] = MODELS) -> Any:
    """The transformers config of a tiny model."""
    import transformers

    _, config, extra = models[name]
    if "text_config" in extra:
        return getattr(transformers, config)(**extra | {"text_config": _SIZES | extra["text_config"]})
    return getattr(transformers, config)(**_SIZES | extra)


def _character(number: int) -> str:
    """Printable ASCII, and then letters: a terminal shows each of them."""
    return chr(33 + number) if number < 94 else chr(192 + number - 94)


def write_models(
    folder: Path, models: Mapping[str, tuple[str, str, dict[str, Any]]] = MODELS | VISION
) -> None:
    """Write tiny models into a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
        from tokenizers import Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import WordLevel

        words = {"<eos>": 0, "<bos>": 1, "<unk>": 2} | {_character(i): 3 + i for i in range(VOCAB - 3)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        )
        fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}!"
        for name, (model, _, _) in models.items():
            torch.manual_seed(7)
            network = getattr(transformers, model)(config_of(name, models)).float()
            with torch.no_grad():
                # Norms start at one and biases at zero, which would hide a wrong mapping.
                routers = (item for item in network.named_buffers() if item[0].endswith("correction_bias"))
                for name_, parameter in (*network.named_parameters(), *routers):
                    if parameter.dim() == 1 or name_.endswith("_bias"):
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            network.save_pretrained(folder / name)
            fast.save_pretrained(folder / name)


def write_rows(path: Path, rows: int, seed: int, row_group_size: int = 10) -> None:
    """Random rows of 6 to 60 tokens, each with a prompt that is not trained."""
    rng = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(rows):
        tokens = rng.integers(3, VOCAB, int(rng.integers(6, 61)))
        trained = tokens.copy()
        trained[: int(rng.integers(1, tokens.size - 1))] = -100
        ids.append(tokens.tolist())
        labels.append(trained.tolist())
    table = pa.table({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_data(folder: Path) -> Path:
    """Write train.parquet and val.parquet, whose 11 rows no batch size divides. Returns the folder."""
    write_rows(folder / "train.parquet", TRAIN_ROWS, seed=1)
    write_rows(folder / "val.parquet", 11, seed=2)
    return folder


def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; skips the test where it is not."""
    default = Path.home() / ".cache/sftd/models/SmolLM2-135M-Instruct"
    folder = Path(os.environ.get("SFTD_TEST_MODEL", default))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model in {folder}: `make demo` fetches it, SFTD_TEST_MODEL names another folder")
    return folder
