"""Write a Hugging Face folder of random weights in the shape of a real model:

    python scripts/write_random_model.py SHAPE DIR [--dtype bfloat16] [--seed 0]

SHAPE: llama2-7b, llama3.1-8b, llama3.2-1b, llama3.2-3b, qwen3-0.6b, smollm2-135m, qwen3-moe, tiny, tiny-deep or tiny-moe.

For benchmarks without downloads, where the values of the weights do not matter. Matrices are normal(0, 0.02), norms are one.
Uses a GPU if there is one. There is no tokenizer: training without sample prompts needs none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}
_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
# The contents of config.json. Missing keys have the defaults of the model's config class.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama3.2-3b": _LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen3-0.6b": _LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "llama3.1-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama2-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "smollm2-135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 250,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    },
    # The layer of Qwen3-30B-A3B; four of them, and a small vocabulary.
    "qwen3-moe": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny-moe": _QWEN3_MOE
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 250,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
    # Divides by TP4 and by PP2 × VPP2.
    "tiny-deep": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 256,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
    },
}
SHARD_BYTES = 2 << 30
# Also the number of shards in memory. Few are enough for the speed of a disk.
_THREADS = 4


def write_config(shape: str, folder: Path, dtype: str = "bfloat16") -> None:
    """Write config.json for a shape of `SHAPES` into an existing folder."""
    config = SHAPES[shape] | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the model."""
    hidden, head = config["hidden_size"], config["head_dim"]
    query, groups = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (groups, hidden)
        yield prefix + "self_attn.v_proj.weight", (groups, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        if config["model_type"].startswith("qwen3"):
            yield prefix + "self_attn.q_norm.weight", (head,)
            yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        width, parts = config["intermediate_size"], ["mlp."]
        if "num_experts" in config:
            yield prefix + "mlp.gate.weight", (config["num_experts"], hidden)
            width = config["moe_intermediate_size"]
            parts = [f"mlp.experts.{number}." for number in range(config["num_experts"])]
        for part in parts:
            yield prefix + part + "gate_proj.weight", (width, hidden)
            yield prefix + part + "up_proj.weight", (width, hidden)
            yield prefix + part + "down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_weights(shape: str, folder: Path, dtype: str, seed: int) -> int:
    """Write the shards and their index. Returns the bytes of all weights."""
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def size(dimensions: tuple[int, ...]) -> int:
        return torch.Size(dimensions).numel() * kind.itemsize

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dimensions in tensors(SHAPES[shape]):
        if shards[-1] and filled + size(dimensions) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dimensions))
        filled += size(dimensions)

    def write(number: int) -> tuple[str, list[str], int]:
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        # One generator per shard, so that the result does not depend on the threads' order.
        generator = torch.Generator(device).manual_seed(seed * len(shards) + number)
        content = {}
        for name, dimensions in shards[number]:
            if len(dimensions) == 1:
                content[name] = torch.ones(dimensions, dtype=kind)
            else:
                values = torch.empty(dimensions, dtype=kind, device=device)
                content[name] = values.normal_(0.0, 0.02, generator=generator).cpu()
        save_file(content, folder / file, metadata={"format": "pt"})
        return file, list(content), sum(t.nbytes for t in content.values())

    with ThreadPoolExecutor(_THREADS) as pool:
        written = list(pool.map(write, range(len(shards))))
    total = sum(nbytes for _, _, nbytes in written)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names, _ in written for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("*.safetensors"), None):
        parser.error(f"{folder} already holds weights: name an empty folder")
    write_config(arguments.shape, folder, arguments.dtype)
    total = write_weights(arguments.shape, folder, arguments.dtype, arguments.seed)
    print(f"{folder}: {arguments.shape}, {total / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
