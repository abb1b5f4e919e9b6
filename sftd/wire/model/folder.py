"""Reading the shape of a Hugging Face model folder without transformers."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from sftd.domain.errors import Problem, Refused
from sftd.domain.model.checks import ModelShape, check_architecture
from sftd.domain.text.words import counted
from sftd.wire.model.digest import INDEX, read_header, weight_files

_WHERE = "model.partial_pretrain"
# A tokenizer is read from one of these; its other files only describe it.
_TOKENIZER = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken", "*.py")


def read_config(folder: str, override: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model folder with `override` laid over it. Raises `Refused`."""
    path = Path(folder)
    fix = "give a folder that holds config.json, *.safetensors and the tokenizer"
    if path.is_file():
        raise Refused(Problem(_WHERE, f"{folder} is a file", "give the folder that holds config.json"))
    if not path.is_dir():
        raise Refused(Problem(_WHERE, f"no such folder: {folder}", fix))
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise Refused(Problem(_WHERE, f"{folder} holds no config.json", fix)) from None
    except (ValueError, OSError, RecursionError) as error:
        raise Refused(Problem(_WHERE, f"{folder}/config.json cannot be read: {error}", fix)) from None
    if not isinstance(config, dict):
        raise Refused(Problem(_WHERE, f"{folder}/config.json is not a mapping", fix))
    return config | override


# What `read_shape` reads: to override anything else would change nothing.
_KEYS = (
    "architectures hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings "
    "attention_bias mlp_bias hidden_act sliding_window use_sliding_window num_experts num_local_experts "
    "num_experts_per_tok moe_intermediate_size norm_topk_prob mlp_only_layers decoder_sparse_step "
    "shared_expert_intermediate_size router_jitter_noise"
).split()


def _refuse_unknown(override: dict[str, Any]) -> None:
    problems = []
    for key in override:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1)
            fix = (
                f"did you mean `{nearest[0]}`?"
                if nearest
                else "leave it out; these are read: " + ", ".join(_KEYS)
            )
            problems.append(Problem(f"model.override_config.{key}", "is not read by the trainer", fix))
    if problems:
        raise Refused(problems)


def read_shape(folder: str, override: dict[str, Any]) -> ModelShape:
    """Shape of the model in `folder`. Raises `Refused` when it cannot be read or lacks a needed key."""
    _refuse_unknown(override)
    config = read_config(folder, override)
    # First of all: another architecture's config.json lacks keys, and that is not what is wrong.
    architecture = _architecture(config)
    if problem := check_architecture(architecture):
        raise Refused(problem)
    try:
        # transformers 5 writes RoPE settings as one mapping, 4 as two keys.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
        if "rope_parameters" not in override:
            # What the user says wins over either spelling in the file.
            if "rope_scaling" in override:
                rope = dict(override["rope_scaling"] or {})
            theta = override.get("rope_theta", rope.pop("rope_theta", theta))
        scaling = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
        heads = int(config["num_attention_heads"])
        return ModelShape(
            architecture=architecture,
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "Qwen2ForCausalLM" or bool(config.get("attention_bias", False)),
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            hidden_act=str(config.get("hidden_act", "silu")),
            sliding_window=_sliding_window(config),
            mlp_bias=bool(config.get("mlp_bias", False)),
            **_experts(config, architecture),
        )
    except KeyError as error:
        raise Refused(
            Problem(
                _WHERE, f"{folder}/config.json has no {error}", "give the folder of a causal language model"
            )
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Refused(
            Problem(_WHERE, f"{folder}/config.json: {error}", "fix config.json or model.override_config")
        ) from None


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _experts(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The fields of `ModelShape` that a mixture of experts has besides; what a config.json leaves out is as
    transformers has it by default. Raises `KeyError`."""
    if architecture == "MixtralForCausalLM":
        count, units, chosen, is_normalised = (
            config["num_local_experts"],
            config["intermediate_size"],
            2,
            True,
        )
    elif architecture == "Qwen3MoeForCausalLM":
        # Published configs say num_experts, those that transformers 5 writes num_local_experts.
        count = config.get("num_experts") or config["num_local_experts"]
        units, chosen, is_normalised = config["moe_intermediate_size"], 8, config.get("norm_topk_prob", False)
    else:
        return {}
    unsupported = {
        "dense layers between its MoE layers (mlp_only_layers, decoder_sparse_step)": (
            config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
        ),
        "shared experts (shared_expert_intermediate_size)": config.get("shared_expert_intermediate_size"),
        "router noise (router_jitter_noise)": config.get("router_jitter_noise"),
    }
    return {
        "num_experts": int(count),
        "num_experts_per_tok": int(config.get("num_experts_per_tok", chosen)),
        "moe_intermediate_size": int(units),
        "norm_topk_prob": bool(is_normalised),
        "unsupported": tuple(what for what, is_asked in unsupported.items() if is_asked),
    }


def _sliding_window(config: dict[str, Any]) -> int | None:
    # Qwen names a window that it does not use unless use_sliding_window says so; Mistral has no such key.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return None if window is None else int(window)


_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}


def exported_config(folder: str, override: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for weights of `dtype` ("bfloat16", …) that were trained from `folder` with `override`.

    `read_shape` finds the same shape in it as in `folder` with `override`. Raises `Refused`.
    """
    config = read_config(folder, override)
    if _ROPE_KEYS & override.keys():
        # In both spellings, each of which says all of it: transformers 4 reads the two keys, 5 the one mapping.
        shape = read_shape(folder, override)
        scaling, theta = shape.rope_scaling, {"rope_theta": shape.rope_theta}
        config |= {"rope_scaling": scaling, **theta}
        config["rope_parameters"] = {"rope_type": "default"} | (scaling or {}) | theta
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return config | {key: dtype}


def check_weights(folder: str) -> None:
    """That the folder holds safetensors weights, all shards of them. Raises `Refused`."""
    path = Path(folder)
    try:
        files = weight_files(path)
        missing = [name for name in files if not (path / name).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        what = f"{path / INDEX} cannot be read: {error}"
        raise Refused(Problem(_WHERE, what, "fetch the model again")) from None
    if missing:
        what = f"{folder} lacks {counted(len(missing), 'weight file')}, such as {missing[0]}"
        raise Refused(Problem(_WHERE, what, "fetch the model again"))
    if not files:
        raise Refused(
            Problem(_WHERE, f"{folder} holds no *.safetensors", "save the model with safe_serialization")
        )
    for file in sorted(path.glob("*.safetensors")):
        if not _is_whole(file):
            raise Refused(
                Problem(_WHERE, f"{file} is cut short or not a safetensors file", "fetch the model again")
            )


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of the header's length, the header, the data."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            _, header = read_header(stream, size)
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return bool(ends) and size == 8 + len(header) + max(ends)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False


def stop_ids(folder: str) -> tuple[int, ...]:
    """The ids of the tokens at which generation ends, as config.json and generation_config.json say; none where they say
    nothing."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            named = json.loads((Path(folder) / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        found.update(i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int))
    return tuple(sorted(found))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer is read from."""
    return any(any(folder.glob(name)) for name in _TOKENIZER)
