"""What is read of a model's config.json, what of it is refused at submit, and what an export writes back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.errors import Refused
from sftd.domain.model.rules import MODEL, check_architecture
from sftd.domain.spec.parse import parse
from sftd.wire.model import folder as model_folder
from sftd.wire.model.folder import exported_config, read_shape
from sftd.wire.model.text_part import text_name
from tests.builders.paths import ROOT
from tests.builders.plan.model_configs import DENSE

# As their publishers write them: transformers 4's keys.
MIXTRAL = DENSE | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
}
QWEN3_MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
DEEPSEEK = DENSE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EP = "model.megatron.expert_model_parallel_size"
TP = "model.megatron.tensor_model_parallel_size"
SP = "model.megatron.sequence_parallel"


def folder_of(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def problems_of(path: Path, config: dict[str, Any], *overrides: tuple[str, Any]) -> dict[str, str]:
    """Where → what and how to fix it, of a spec with this model."""
    given = {
        "model": {"partial_pretrain": folder_of(path, config)},
        "data": {"train_files": ["/t"], "val_files": ["/v"]},
    }
    try:
        spec, _ = parse(given, overrides)
    except Refused as refused:
        found = list(refused.problems)
    else:
        found = MODEL.problems(spec, read_shape(str(path), {}))
    return {p.where: f"{p.what} | {p.fix}" for p in found}


def test_experts_are_read_as_their_publishers_write_them(tmp_path: Path) -> None:
    mixtral = read_shape(folder_of(tmp_path, MIXTRAL), {})
    assert (mixtral.num_experts, mixtral.num_experts_per_tok) == (8, 2)
    assert (mixtral.moe_intermediate_size, mixtral.norm_topk_prob, mixtral.qk_norm) == (128, True, False)
    qwen = read_shape(folder_of(tmp_path, QWEN3_MOE), {})
    assert (qwen.num_experts, qwen.num_experts_per_tok, qwen.moe_intermediate_size) == (6, 3, 48)
    assert (qwen.norm_topk_prob, qwen.qk_norm, qwen.head_dim) == (True, True, 32)
    # transformers 5 says num_local_experts; what is not said is as it has it by default.
    renamed = {k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts", "norm_topk_prob")}
    other = read_shape(folder_of(tmp_path, renamed | {"num_local_experts": 6}), {})
    assert (other.num_experts, other.norm_topk_prob) == (6, False)
    sparse = QWEN3_MOE | {"mlp_only_layers": [3], "decoder_sparse_step": 2, "num_hidden_layers": 6}
    assert read_shape(folder_of(tmp_path, sparse), {}).layers_without_experts == (0, 2, 3, 4)
    deepseek = read_shape(folder_of(tmp_path, DEEPSEEK), {})
    assert (deepseek.head_dim, deepseek.rotary_dim, deepseek.num_key_value_heads) == (24, 8, 4)
    assert (deepseek.shared_expert_intermediate_size, deepseek.layers_without_experts) == (96, (0, 1, 2))
    assert (deepseek.routed_scaling_factor, deepseek.norm_topk_prob, deepseek.q_lora_rank) == (2.5, True, 0)
    dense = read_shape(folder_of(tmp_path, DENSE), {})
    assert (dense.num_experts, dense.unsupported) == (0, ())


@pytest.mark.parametrize("config", [DENSE, MIXTRAL, QWEN3_MOE])
def test_a_model_that_fits_has_no_problem(tmp_path: Path, config: dict[str, Any]) -> None:
    assert problems_of(tmp_path, config) == {}
    if config != DENSE:
        assert problems_of(tmp_path, config, (EP, 2)) == {}
        # Experts are whole then: their units need not be divisible.
        odd = config | {"moe_intermediate_size": 33}
        assert problems_of(tmp_path, odd, (EP, 2), (TP, 2), (SP, True)) == {}


@pytest.mark.parametrize(
    ("config", "overrides", "where", "says"),
    [
        (DENSE, [(EP, 2)], EP, "has no experts to shard"),
        (QWEN3_MOE, [(EP, 4)], EP, "use one of 1, 2, 3, 6"),
        (
            QWEN3_MOE,
            [(EP, 3), ("launch.nproc_per_node", 4), ("data.train_batch_size", 4)],
            EP,
            "4 ranks ÷ PP 1 = 4",
        ),
        (QWEN3_MOE, [(TP, 2)], SP, "turn it on"),
        (QWEN3_MOE | {"moe_intermediate_size": 33}, [(TP, 2), (SP, True)], TP, "33 units of an expert"),
        (DEEPSEEK | {"scoring_func": "softmax"}, [], "model.partial_pretrain", "(scoring_func)"),
        (QWEN3_MOE | {"shared_expert_intermediate_size": 4}, [], "model.partial_pretrain", "shared experts"),
        (QWEN3_MOE | {"num_experts_per_tok": 7}, [], "model.partial_pretrain", "7 of 6 experts"),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, [], "model.partial_pretrain", "1 of 6 experts"),
        (QWEN3_MOE | {"attention_bias": True}, [], "model.partial_pretrain", "attention_bias"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, [], "model.partial_pretrain", "router_jitter_noise"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], overrides: list[tuple[str, Any]], where: str, says: str
) -> None:
    assert says in problems_of(tmp_path, config, *overrides)[where]


def test_the_ranks_of_a_run_are_enough_to_share_the_experts(tmp_path: Path) -> None:
    given = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}
    ranks = {(1, 1): 1, (1, 4): 4, (2, 4): 4, (4, 2): 4, (2, 3): 6}
    for (tp, ep), expected in ranks.items():
        spec, _ = parse(given, [(TP, tp), (EP, ep), ("data.train_batch_size", 12)])
        assert spec.world_size == expected


@pytest.mark.parametrize(
    "override",
    [
        {},
        {"rope_theta": 10000.0},
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 20000.0},
        {"rope_scaling": None},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 30000.0}},
        {"rms_norm_eps": 1e-3},
    ],
)
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 40000.0}},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 50000.0}},
    ],
)
def test_an_exported_config_has_the_shape_that_was_trained(
    tmp_path: Path, rope: dict[str, Any], override: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path, DENSE | rope)
    trained = read_shape(folder, override)
    config = exported_config(folder, override, "float32")
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config
    assert read_shape(folder_of(tmp_path, config), {}) == trained


def test_an_exported_config_is_the_original_where_nothing_was_changed(tmp_path: Path) -> None:
    config = {k: v for k, v in DENSE.items() if k != "torch_dtype"} | {"dtype": "bfloat16", "mine": 1}
    assert exported_config(folder_of(tmp_path, config), {}, "bfloat16") == config


def write_weights(folder: Path, *, missing: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    (folder / "model.safetensors").write_bytes(data[: len(data) - missing])


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path)
    model_folder.check_weights(str(tmp_path))
    for missing in (1, 16, 30, 1000):
        write_weights(tmp_path, missing=missing)
        with pytest.raises(Refused, match="cut short"):
            model_folder.check_weights(str(tmp_path))


def test_a_folder_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(Refused, match=r"config\.json cannot be read"):
        model_folder.read_config(str(tmp_path), {})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(Refused, match=r"index\.json cannot be read"):
        model_folder.check_weights(str(tmp_path))
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    with pytest.raises(Refused, match=r"lacks 1 weight file, such as a\.safetensors"):
        model_folder.check_weights(str(tmp_path))


def test_a_tokenizer_is_one_of_several_files(tmp_path: Path) -> None:
    assert not model_folder.has_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tekken.json", "qwen.tiktoken", "tokenization_own.py"):
        (tmp_path / name).touch()
        assert model_folder.has_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"], "n_head": 12, "n_embd": 768},
        DENSE | {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "attention_bias": True},
        DENSE
        | {
            "architectures": ["JambaForCausalLM"],
            "sliding_window": 128,
            "rope_scaling": {"rope_type": "yarn"},
        },
    ],
)
def test_an_unsupported_architecture_is_the_only_problem(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        read_shape(folder_of(tmp_path, config), {})
    (problem,) = refused.value.problems
    assert problem.what.startswith(f"{config['architectures'][0]} is not supported")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Qwen3VLForConditionalGeneration", "Qwen3ForCausalLM"),
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3MoeForCausalLM"),
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2ForCausalLM"),
        ("LlamaModel", "LlamaForCausalLM"),
        # A name that only begins alike is another family.
        ("GPT2LMHeadModel", None),
        ("SmolVLMForConditionalGeneration", None),
        ("_", None),
        ("", None),
    ],
)
def test_the_nearest_supported_family_has_the_same_name(name: str, nearest: str | None) -> None:
    problem = check_architecture(name)
    assert problem is not None
    what = f"{name} is not supported" if name else "config.json names no architecture"
    assert problem.what == what + (f"; the nearest supported family is {nearest}" if nearest else "")
    assert "docs/models.md: llama, mistral, " in problem.fix
    assert 'docs/architecture.md, "A model family"' in problem.fix


def test_the_recipe_that_a_refusal_names_exists() -> None:
    page, heading = re.findall(r'\((docs/[a-z]+\.md), "(.+)"\)', check_architecture("BertModel").fix)[0]  # type: ignore[union-attr]
    assert f"**{heading}.**" in (ROOT / page).read_text()


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", {}])
def test_a_config_that_names_no_architecture_is_refused(tmp_path: Path, named: Any) -> None:
    with pytest.raises(Refused, match="names no architecture"):
        read_shape(folder_of(tmp_path, DENSE | {"architectures": named}), {})


def test_a_file_as_a_model_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(Refused, match="is a file"):
        read_shape(str(tmp_path / "m.safetensors"), {})


def test_an_exported_config_says_its_rope_in_both_spellings(tmp_path: Path) -> None:
    """transformers 4 reads two keys, 5 one mapping."""
    folder = folder_of(tmp_path, DENSE)
    config = exported_config(folder, {"rope_theta": 7.0, "rope_scaling": LLAMA3_ROPE}, "float32")
    assert (config["rope_theta"], config["rope_scaling"]) == (7.0, LLAMA3_ROPE)
    assert config["rope_parameters"] == LLAMA3_ROPE | {"rope_theta": 7.0}
    plain = exported_config(folder, {"rope_theta": 7.0}, "float32")
    assert (plain["rope_theta"], plain["rope_scaling"]) == (7.0, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 7.0}


def test_compressed_weights_that_the_trainer_does_not_read_are_refused(tmp_path: Path) -> None:
    shape = read_shape(folder_of(tmp_path, DENSE | {"quantization_config": {"quant_method": "fp8"}}), {})
    assert shape.unsupported == ("weights in fp8 (quantization_config)",)
    shape = read_shape(folder_of(tmp_path, DENSE | {"quantization_config": {"quant_method": "mxfp4"}}), {})
    assert shape.unsupported == ()


def test_an_exported_config_does_not_say_that_its_weights_are_compressed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, DENSE | {"quantization_config": {"quant_method": "mxfp4"}})
    assert "quantization_config" not in exported_config(folder, {}, "bfloat16")


INSIDE = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "torch_dtype": "bfloat16",
    "image_token_id": 7,
    "text_config": {k: v for k, v in DENSE.items() if k != "architectures"} | {"model_type": "qwen3_vl_text"},
    "vision_config": {"hidden_size": 1},
}


@pytest.mark.parametrize(("outside", "inside"), [(True, False), (False, True), (None, True), (False, False)])
def test_a_language_model_inside_another_is_read_as_one_by_itself(
    tmp_path: Path, outside: bool | None, inside: bool
) -> None:
    config = INSIDE | {"text_config": INSIDE["text_config"] | {"tie_word_embeddings": inside}}
    if outside is not None:
        config["tie_word_embeddings"] = outside
    alone = DENSE | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": bool(outside or inside)}
    expected = read_shape(folder_of(tmp_path, alone), {})
    assert read_shape(folder_of(tmp_path, config), {}) == expected


def test_an_unknown_language_model_inside_another_is_refused_by_its_name(tmp_path: Path) -> None:
    config = INSIDE | {"text_config": INSIDE["text_config"] | {"model_type": "bert"}}
    with pytest.raises(
        Refused, match=r"Qwen3VLForConditionalGeneration is not supported.*the model_type inside is bert"
    ):
        read_shape(folder_of(tmp_path, config), {})


def test_an_export_changes_the_config_of_the_language_model_inside_only(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [1, 1, 2]}
    whole = INSIDE | {"text_config": INSIDE["text_config"] | {"rope_parameters": rope}}
    folder = folder_of(tmp_path, whole)
    assert exported_config(folder, {}, "float32") == whole | {
        "torch_dtype": "float32",
        "text_config": whole["text_config"] | {"torch_dtype": "float32"},
    }
    override = {"rope_theta": 7.0, "tie_word_embeddings": True}
    trained, found = read_shape(folder, override), exported_config(folder, override, "bfloat16")
    assert found["text_config"]["rope_parameters"] == rope | {"rope_theta": 7.0}
    assert "rope_theta" not in found
    assert read_shape(folder_of(tmp_path, found), {}) == trained


def test_answers_end_as_the_language_model_inside_says(tmp_path: Path) -> None:
    config = INSIDE | {"text_config": INSIDE["text_config"] | {"eos_token_id": [5, 6]}}
    assert model_folder.stop_ids(folder_of(tmp_path, config)) == (5, 6)


@pytest.mark.parametrize(
    ("stored", "alone"),
    [
        ("model.language_model.layers.0.a", "model.layers.0.a"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.language_model.layers.0.a", "base_model.model.model.layers.0.a"),
        *(
            (name, name)
            for name in ("lm_head.weight", "model.visual.a", "vision_tower.a", "model.layers.0.a")
        ),
    ],
)
def test_a_weight_inside_has_the_name_of_one_by_itself(stored: str, alone: str) -> None:
    assert text_name(stored) == alone


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    least = {
        k: v
        for k, v in DENSE.items()
        if k not in ("num_key_value_heads", "max_position_embeddings", "rope_theta", "torch_dtype")
    }
    shape = read_shape(folder_of(tmp_path, least), {})
    assert (shape.num_key_value_heads, shape.head_dim) == (4, 16)
    assert (shape.rope_theta, shape.rope_scaling) == (10000.0, None)
    assert (shape.tie_word_embeddings, shape.attention_bias, shape.qk_norm) == (False, False, False)
    assert (shape.num_experts, shape.sliding_window) == (0, None)
    mixtral = {k: v for k, v in MIXTRAL.items() if k != "num_experts_per_tok"}
    shape = read_shape(folder_of(tmp_path, mixtral), {})
    assert (shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (8, 2, 128)
    assert shape.norm_topk_prob
    qwen = {k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts_per_tok", "norm_topk_prob")}
    shape = read_shape(folder_of(tmp_path, qwen), {})
    assert (shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (6, 8, 48)
    assert not shape.norm_topk_prob
    window = DENSE | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    assert read_shape(folder_of(tmp_path, window), {}).sliding_window is None


def test_each_layer_has_the_window_that_transformers_gives_it(tmp_path: Path) -> None:
    def windows(architecture: str, **more: Any) -> list[int | None]:
        config = (
            DENSE | {"architectures": [architecture], "num_hidden_layers": 4, "sliding_window": 128} | more
        )
        shape = read_shape(folder_of(tmp_path, config), {})
        return [shape.window(layer) for layer in range(4)]

    assert windows("MistralForCausalLM") == [128] * 4
    switch = {"use_sliding_window": True}
    assert windows("Qwen2ForCausalLM", max_window_layers=3, **switch) == [None, None, None, 128]
    assert windows("Qwen3ForCausalLM", **switch) == [None] * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert windows("Qwen3ForCausalLM", layer_types=types, **switch) == [128, None] * 2
    assert windows("Qwen3ForCausalLM", layer_types=types) == [None] * 4
    assert windows("SmolLM3ForCausalLM", no_rope_layer_interval=2, **switch) == [None, 128] * 2
    assert windows("SmolLM3ForCausalLM", no_rope_layer_interval=2) == [None] * 4


def test_layers_with_and_without_a_window_have_their_own_rope(tmp_path: Path) -> None:
    def rope(full: dict[str, Any], local: dict[str, Any], **override: Any) -> tuple[Any, ...]:
        both = {"full_attention": full, "sliding_attention": local}
        window = {"sliding_window": 128, "use_sliding_window": True, "rope_parameters": both}
        folder = folder_of(tmp_path, DENSE | {"architectures": ["Qwen3ForCausalLM"]} | window)
        shape = read_shape(folder, override)
        if override:
            folder = folder_of(tmp_path, exported_config(folder, override, "float32"))
            assert read_shape(folder, {}) == shape
        return shape.rope_theta, shape.rope_scaling, shape.window_rope_theta

    default = {"rope_type": "default", "rope_theta": 10000.0}
    assert rope(default | {"rope_theta": 1e6}, default) == (1e6, None, 10000.0)
    # OLMo 3's: the same theta, and YaRN in some layers only.
    scaled = LLAMA3_ROPE | {"rope_theta": 10000.0}
    assert rope(scaled, default) == (10000.0, LLAMA3_ROPE, 10000.0)
    assert rope(scaled, scaled) == (10000.0, LLAMA3_ROPE, None)
    assert rope(default | {"rope_theta": 1e6}, default, rope_theta=5.0) == (5.0, None, 10000.0)
    with pytest.raises(Refused, match="a RoPE scaling of its own"):
        rope(default, scaled)


def test_phi_has_the_length_of_its_training_beside_the_scaling(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    config = DENSE | {"rope_scaling": scaling, "original_max_position_embeddings": 7}
    shape = read_shape(folder_of(tmp_path, config), {})
    assert shape.rope_scaling == scaling | {"original_max_position_embeddings": 7}
