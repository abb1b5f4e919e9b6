"""Exports of adapters as peft reads them, and the proof: an export computes what the trainer does, and a planted error is found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders.paths import RANKS
from tests.builders.trainer.tiny_models import PROMPT
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Trainer

RANK = 4
MERGED_BF16 = "merged_bf16"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
JOINED = ("qkv_proj", "gate_up_proj")
# Name → (model, what its spec gets, whether it is exported with --merge).
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("llama", {}, False),
    "full_bf16": (
        "qwen2",
        {MEGATRON + "params_dtype": "bfloat16", "model__freeze": ["^model.embed_tokens"]},
        False,
    ),
    "adapter": ("llama_tied", {"model__lora__rank": RANK, "model__lora__dropout": 0.25}, False),
    "adapter_bf16": (
        "qwen3",
        {
            "model__lora__rank": RANK,
            "model__lora__rslora": True,
            "model__lora__targets": ["q", "down"],
            MEGATRON + "params_dtype": "bfloat16",
        },
        False,
    ),
    "merged": ("llama_tied", {"model__lora__rank": RANK}, True),
    MERGED_BF16: ("llama_tied", {"model__lora__rank": RANK, MEGATRON + "params_dtype": "bfloat16"}, True),
    "nf4": ("llama_tied", {"model__lora__rank": RANK, "model__quantize": "nf4"}, False),
    "merged_nf4": ("llama_tied", {"model__lora__rank": RANK, "model__quantize": "nf4"}, True),
    # Several projections are one tensor of the folder.
    "phi3": ("phi3", {"model__lora__rank": RANK, "model__lora__rslora": True}, False),
    "merged_glm4": ("glm4", {"model__lora__rank": RANK}, True),
    "mixtral": ("mixtral", {"model__lora__rank": RANK}, False),
    # Inside vision-language models.
    "qwen3_5_vision": ("qwen3_5_vision", {}, False),
    "gemma3_vision": ("gemma3_vision", {}, False),
    "qwen3_vision": ("qwen3_vision", {"model__lora__rank": RANK}, False),
    "mistral3_vision": ("mistral3_vision", {"model__lora__rank": RANK}, True),
    "qwen3_moe": ("qwen3_moe", {"model__lora__rank": RANK, "model__lora__rslora": True}, False),
}


def write_adapter(model: Path, folder: Path) -> Path:
    """A random adapter of all projections of a model, one of each expert, in the names that PEFT gives to modules."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if module.startswith(("vision_tower", "model.visual")):
            continue
        if kind == "weight" and module.rpartition(".")[2] in (*PROJECTIONS, *JOINED):
            rows, columns = weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.03
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def outcomes(trainer: Trainer, tool: str, arguments: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit code and message of each call of a tool."""
    (folder / "arguments.json").write_text(json.dumps(arguments))
    files = [str(folder / "arguments.json"), str(folder / "outcomes.json")]
    argv = [sys.executable, str(RANKS / "export_all.py"), *files, tool]
    done = subprocess.run(argv, env=trainer.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads((folder / "outcomes.json").read_text())]


@pytest.fixture(scope="module")
def exports(
    trainer: Trainer, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """By case: the exported folder, and what the trainer computes."""
    root = tmp_path_factory.mktemp("prove")
    attempts = {}
    for name, (model, overrides, _) in CASES.items():
        given = {"model__partial_pretrain": str(models / model), **overrides}
        if "model__lora__rank" in overrides:
            (root / f"{name}-start").mkdir()
            given["model__lora__adapter"] = str(write_adapter(models / model, root / f"{name}-start"))
        attempts[name] = trainer.prepare(f"prove_{name}", trainer.spec(**given))
    main = trainer.prepare("prove", trainer.spec())
    (main.path / "attempts.json").write_text(json.dumps([str(a.path) for a in attempts.values()]))
    trainer.finish(main, trainer.start(main, script=RANKS / "export_ranks.py"))
    sources = {
        name: [str(a.order_file), str(a.path / "checkpoints/step-00000001")] for name, a in attempts.items()
    }
    (root / "sources.json").write_text(json.dumps(sources))
    arguments = [
        [*sources[name], str(root / name), *(["--merge"] if merge else [])]
        for name, (_, _, merge) in CASES.items()
    ]
    # What the export names as the model of an adapter that was started from the hub's cache.
    (root / "models--org--tiny/snapshots").mkdir(parents=True)
    snapshot = root / "models--org--tiny/snapshots/c0ffee"
    snapshot.symlink_to(models / "llama_tied")
    overrides = CASES["adapter"][1] | {"model__partial_pretrain": str(snapshot)}
    order = trainer.prepare("prove_hub", trainer.spec(**overrides)).order_file
    arguments.append([str(order), sources["adapter"][1], str(root / "hub")])
    assert outcomes(trainer, "__main__", arguments, root) == [(0, "")] * len(arguments)
    arguments = [
        [*sources[name], str(root / f"{name}.reference"), "--position", "8", *(["--merge"] if merge else [])]
        for name, (_, _, merge) in CASES.items()
    ]
    assert outcomes(trainer, "reference", arguments, root) == [(0, "")] * len(arguments)
    return {name: (root / name, root / f"{name}.reference") for name in CASES}


def sources_of(folder: Path) -> dict[str, list[str]]:
    """By case: order and checkpoint."""
    return json.loads(folder.with_name("sources.json").read_text())


def compare(folder: Path, reference: Path) -> dict[str, Any]:
    class Events:
        def progress(self, stage: str) -> None:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        from sftd.trainer.tools.export import prove

        torch.set_num_threads(1)
        return prove.compare(folder, reference, Events())


def is_proven(found: dict[str, Any]) -> bool:
    """As the command judges it."""
    return float(found["largest_difference"]) <= float(found["tolerance"]) and not found["other_token"]


@pytest.mark.parametrize("name", CASES)
def test_an_export_computes_what_the_trainer_does(exports: dict[str, tuple[Path, Path]], name: str) -> None:
    folder, reference = exports[name]
    found = compare(folder, reference)
    assert is_proven(found), found
    assert found["rows"] == 8
    # Behind a tie there is nothing to compare.
    assert found["tokens"] == 8 * 16 or name == MERGED_BF16
    assert found["tokens"] > 64
    assert found["rounding"] == ("bfloat16" if name == MERGED_BF16 else "float32")
    names = {path.name for path in folder.iterdir()}
    assert "tokenizer.json" in names
    _, overrides, is_merged = CASES[name]
    is_peft = "model__lora__rank" in overrides and not is_merged
    assert ("peft" in found["versions"]) == is_peft
    whole = {"config.json", "generation_config.json", "model.safetensors"}
    assert names & whole == (set() if is_peft else whole)


@pytest.mark.parametrize("name", ["qwen3_5_vision", "gemma3_vision", "mistral3_vision"])
def test_a_vision_language_model_is_exported_whole(
    exports: dict[str, tuple[Path, Path]], models: Path, name: str
) -> None:
    from safetensors.torch import load_file

    folder, original = exports[name][0], models / name
    found, known = (load_file(path / "model.safetensors") for path in (folder, original))
    assert found.keys() == known.keys()
    changed = {key for key in known if not found[key].equal(known[key])}
    # The one with a merged adapter has it in the language model.
    is_merged = CASES[name][2]
    assert changed == {
        key for key in known if is_merged and "language_model.model.layers" in key and "proj" in key
    }
    config, before = (json.loads((path / "config.json").read_text()) for path in (folder, original))
    assert config == before


def test_an_adapter_of_a_language_model_inside_leaves_the_rest_alone(
    exports: dict[str, tuple[Path, Path]],
) -> None:
    config = json.loads((exports["qwen3_vision"][0] / "adapter_config.json").read_text())
    pattern = config["target_modules"]
    assert re.fullmatch(pattern, "model.language_model.layers.1.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.visual.blocks.0.attn.q_proj")


def test_the_config_of_an_adapter_is_that_of_the_spec(
    exports: dict[str, tuple[Path, Path]], models: Path
) -> None:
    def config(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "adapter_config.json").read_text())

    found = config(exports["adapter"][0])
    assert found == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(models / "llama_tied"),
        "revision": None,
        "r": RANK,
        "lora_alpha": 32,
        "lora_dropout": 0.25,
        "use_rslora": False,
        "target_modules": sorted(PROJECTIONS[:7]),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    of_hub = config(exports["adapter"][0].with_name("hub"))
    assert of_hub == found | {"base_model_name_or_path": "org/tiny", "revision": "c0ffee"}
    bf16 = config(exports["adapter_bf16"][0])
    assert (bf16["use_rslora"], bf16["target_modules"]) == (True, ["down_proj", "q_proj"])


def swap(first: str, second: str) -> Callable[[Path], None]:
    """Swap two tensors of a folder."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        (path,) = folder.glob("*.safetensors")
        found = load_file(path)
        assert found[first].shape == found[second].shape
        assert not found[first].equal(found[second])
        found[first], found[second] = found[second], found[first]
        save_file(found, path, metadata={"format": "pt"})

    return change


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


LAYERS = "model.layers."
ADAPTER = f"base_model.model.{LAYERS}"
ERRORS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "alpha": ("adapter", edit(lora_alpha=31)),
    "the kind of scale": ("adapter_bf16", edit(use_rslora=False)),
    "the B of q and o": (
        "adapter",
        swap(f"{ADAPTER}0.self_attn.q_proj.lora_B.weight", f"{ADAPTER}0.self_attn.o_proj.lora_B.weight"),
    ),
    "the A of gate and up": (
        "adapter",
        swap(f"{ADAPTER}1.mlp.gate_proj.lora_A.weight", f"{ADAPTER}1.mlp.up_proj.lora_A.weight"),
    ),
    "the B of two experts": (
        "qwen3_moe",
        swap(
            f"{ADAPTER}1.mlp.experts.2.down_proj.lora_B.weight",
            f"{ADAPTER}1.mlp.experts.5.down_proj.lora_B.weight",
        ),
    ),
    "a matrix of two layers": (
        "full",
        swap(f"{LAYERS}0.self_attn.k_proj.weight", f"{LAYERS}3.self_attn.k_proj.weight"),
    ),
    "a rounded matrix of two layers": (
        MERGED_BF16,
        swap(f"{LAYERS}1.mlp.down_proj.weight", f"{LAYERS}2.mlp.down_proj.weight"),
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_found(exports: dict[str, tuple[Path, Path]], tmp_path: Path, error: str) -> None:
    name, plant = ERRORS[error]
    folder, reference = exports[name]
    shutil.copytree(folder, tmp_path / name)
    plant(tmp_path / name)
    found = compare(tmp_path / name, reference)
    assert not is_proven(found)
    assert float(found["largest_difference"]) > 3 * float(found["tolerance"])
    # Of a whole model other tokens are the most probable ones.
    assert found["other_token"] or name != "full"


def test_every_row_counts(exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A weight that is no number, and that only the first row meets."""
    from safetensors.torch import load_file, save_file

    folder, reference = exports["full"]
    rows = load_file(reference)
    others = {token for number in range(1, 8) for token in rows[f"ids.{number}"].tolist()}
    token = next(token for token in rows["ids.0"].tolist() if token not in others)
    shutil.copytree(folder, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    found = compare(tmp_path / "nan", reference)
    assert found["largest_difference"] == "nan"
    assert not is_proven(found)


def test_an_adapter_answers_as_it_does_in_peft(
    trainer: Trainer, exports: dict[str, tuple[Path, Path]], models: Path
) -> None:
    folder, _ = exports["adapter"]
    order, checkpoint = sources_of(folder)["adapter"]
    arguments = [order, checkpoint, "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "sftd.trainer.tools.answer", *arguments, "--device", "cpu"],
        env=trainer.environment(),
        input=json.dumps([PROMPT]),
        capture_output=True,
        text=True,
        check=True,
    )
    [answer] = json.loads(done.stdout.splitlines()[-1])["answers"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        plain = transformers.AutoModelForCausalLM.from_pretrained(models / "llama_tied")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]

        def text_of(model: Any) -> str:
            found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
            return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

        before = text_of(plain)
        after = text_of(peft.PeftModel.from_pretrained(plain, folder))
    assert answer["text"] == after
    assert before != after


def test_adapters_that_peft_cannot_express_are_refused(
    trainer: Trainer, exports: dict[str, tuple[Path, Path]], models: Path, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = [
        {"model__lora__targets": ["q", "up"]},
        {"model__override_config": {"rope_theta": 7.0}},
    ]
    arguments = []
    for number, overrides in enumerate(given):
        spec = trainer.spec(
            model__partial_pretrain=str(models / "mixtral"), model__lora__rank=RANK, **overrides
        )
        order = trainer.prepare(f"prove_refused_{number}", spec).order_file
        _, checkpoint = sources_of(exports["mixtral"][0])["mixtral"]
        arguments.append([str(order), checkpoint, str(tmp_path / "out")])
    found = outcomes(trainer, "__main__", arguments, tmp_path)
    says = [
        "model.lora.targets: peft loads gate and up of experts only together",
        "model.override_config: a PEFT folder",
    ]
    for (code, message), text in zip(found, says, strict=True):
        assert code == 2
        assert text in message
        assert "fix: --merge" in message
    assert not (tmp_path / "out").exists()
