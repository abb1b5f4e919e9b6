"""Export: bit for bit what was loaded, from any layout; usable by transformers; nothing written when it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.log.events import CheckpointPublished, ModelLoaded, SampleGenerated
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint import reduction as checkpoint_reduction
from sftd.wire.model.folder import read_shape
from tests.builders.durability import Trace
from tests.builders.paths import RANKS
from tests.builders.trainer.experts import EP2, overrides_of
from tests.builders.trainer.tiny_models import MODELS, PROMPT, real_model
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer

ALL = RANKS / "export_all.py"
BF16 = "llama_bf16"
# Qwen3.5 with the experts of a layer in one tensor, as it is published; exported as transformers saves it.
JOINED = "qwen3_5_moe"
GIVEN = ChatTemplate(text="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}?")


def export_all(trainer: Trainer, arguments: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit code and message of each export."""
    (folder / "arguments.json").write_text(json.dumps(arguments))
    argv = [sys.executable, str(ALL), str(folder / "arguments.json"), str(folder / "outcomes.json")]
    done = subprocess.run(argv, env=trainer.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads((folder / "outcomes.json").read_text())]


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a model folder by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        new = load_file(path)
        assert not found.keys() & new.keys()
        found |= new
    return found


def differences(found: Path, original: Path) -> list[str]:
    """Names of tensors that are not in both folders with the same dtype, shape and bytes."""
    a, b = tensors(found), tensors(original)
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or a[name].dtype != b[name].dtype or not a[name].equal(b[name])
    ]


@pytest.fixture(scope="module")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, and one of them in BF16 and with two chat templates."""
    import torch
    from safetensors.torch import save_file

    bf16 = tmp_path_factory.mktemp("bf16") / BF16
    shutil.copytree(models / "llama", bf16)
    weights = {name: value.to(torch.bfloat16) for name, value in tensors(bf16).items()}
    save_file(weights, bf16 / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bf16 / "config.json").read_text()) | {"dtype": "bfloat16"}
    (bf16 / "config.json").write_text(json.dumps(config))
    (bf16 / "additional_chat_templates").mkdir()
    (bf16 / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    joined = tmp_path_factory.mktemp("joined") / JOINED
    shutil.copytree(models / JOINED, joined)
    save_file(with_joined_experts(tensors(joined)), joined / "model.safetensors", metadata={"format": "pt"})
    return {name: models / name for name in MODELS} | {BF16: bf16, JOINED: joined}


def with_joined_experts(weights: dict[str, Any]) -> dict[str, Any]:
    """The same weights with the matrices of a layer's experts in two tensors."""
    import torch

    whole: dict[str, dict[int, dict[str, Any]]] = {}
    for name in [name for name in weights if ".experts." in name]:
        layer, _, rest = name.partition(".experts.")
        number, matrix, _ = rest.split(".")
        whole.setdefault(layer, {}).setdefault(int(number), {})[matrix] = weights.pop(name)
    for layer, experts in whole.items():
        each = [experts[number] for number in range(len(experts))]
        pairs = [torch.cat((e["gate_proj"], e["up_proj"])) for e in each]
        weights[f"{layer}.experts.gate_up_proj"] = torch.stack(pairs)
        weights[f"{layer}.experts.down_proj"] = torch.stack([e["down_proj"] for e in each])
    return weights


def publish_and_export(
    trainer: Trainer,
    folders: dict[str, Path],
    name: str,
    ranks: int,
    root: Path,
    template: ChatTemplate | None = None,
    *,
    reduced: bool = False,
    **overrides: Any,
) -> dict[str, Path]:
    """Each model loaded into a layout, saved and exported: where to. `template` is that of the training data; `reduced`: from
    checkpoints that hold weights alone."""

    def spec_of(model: str) -> Any:
        dtype = "bfloat16" if model == BF16 else "float32"
        # A layout of the ranks is the same with experts or without.
        has_experts = read_shape(str(folders[model]), {}).num_experts
        expert = {} if has_experts else {MEGATRON + "expert_model_parallel_size": 1}
        given = overrides | expert | {MEGATRON + "params_dtype": dtype}
        return trainer.spec(ranks, model__partial_pretrain=str(folders[model]), **given)

    def published(checkpoint: Path) -> Path:
        if not reduced:
            return checkpoint
        size = sum(f.stat().st_size for f in checkpoint.iterdir())
        digest = manifests.digest((checkpoint / manifests.NAME).read_bytes())
        weights = checkpoint_reduction.reduce(checkpoint, digest)
        assert weights is not None
        assert weights.freed > 0.6 * size, "two moments, and the weights once more where they are in BF16"
        shutil.rmtree(checkpoint)
        return Path(weights.path)

    main = trainer.prepare(f"export_{name}", trainer.spec(ranks, **overrides))
    attempts = {
        model: trainer.prepare(f"export_{name}_{model}", spec_of(model), template=template)
        for model in folders
    }
    (main.path / "attempts.json").write_text(json.dumps([str(a.path) for a in attempts.values()]))
    trainer.finish(main, trainer.start(main, script=RANKS / "export_ranks.py"))
    outs = {model: root / model for model in folders}
    arguments = [
        [str(a.order_file), str(published(a.path / "checkpoints/step-00000001")), str(outs[model])]
        for model, a in attempts.items()
    ]
    assert [message for _, message in export_all(trainer, arguments, root)] == [""] * len(folders)
    for attempt in attempts.values():
        shutil.rmtree(attempt.path / "checkpoints")
    return outs


@pytest.fixture(scope="module")
def of_one_rank(trainer: Trainer, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return publish_and_export(trainer, folders, "one", 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def of_four_ranks(
    trainer: Trainer, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    layout = {
        MEGATRON + "tensor_model_parallel_size": 2,
        MEGATRON + "pipeline_model_parallel_size": 2,
        MEGATRON + "sequence_parallel": True,
        MEGATRON + "expert_model_parallel_size": 2,
    }
    return publish_and_export(
        trainer, folders, "four", 4, tmp_path_factory.mktemp("four"), GIVEN, reduced=True, **layout
    )


@pytest.mark.parametrize("name", [*MODELS, BF16])
def test_what_was_loaded_is_exported_bit_for_bit(
    of_one_rank: dict[str, Path], folders: dict[str, Path], models: Path, name: str
) -> None:
    out, original = of_one_rank[name], folders[BF16] if name == BF16 else models / name
    assert differences(out, original) == []
    assert json.loads((out / "config.json").read_text()) == json.loads((original / "config.json").read_text())
    names = {path.relative_to(original) for path in original.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == names
    for copied in names:
        if copied.name not in ("config.json", "model.safetensors") and (original / copied).is_file():
            assert (out / copied).read_bytes() == (original / copied).read_bytes()


def test_a_matrix_of_an_expert_is_read_from_the_tensor_of_all(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from sftd.trainer.errors import UserError
    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties

    quiet_third_parties()
    from sftd.trainer.model import weights

    inside, alone = "model.language_model.layers.0.mlp.experts.", "model.layers.0.mlp.experts."
    both, down = torch.rand(3, 8, 5), torch.rand(3, 5, 4)
    save_file({f"{inside}gate_up_proj": both, f"{inside}down_proj": down}, tmp_path / "model.safetensors")
    with ExitStack() as stack:
        folder = weights.Folder(str(tmp_path), stack)
        up = f"{alone}2.up_proj.weight"
        assert folder.read(up).equal(both[2, 4:])
        assert folder.read(up, 0, (1, 2)).equal(both[2, 6:])
        assert folder.read(f"{alone}1.down_proj.weight", 1, (0, 2)).equal(down[1, :, :2])
        assert folder.stored_name(up) == f"{inside}2.up_proj.weight"
        with pytest.raises(UserError, match="gate_up_proj holds 3 experts"):
            folder.read(f"{alone}3.gate_proj.weight")
        with pytest.raises(UserError, match="lack model"):
            folder.read("model.norm.weight")


def test_an_export_survives_a_power_cut(of_one_rank: dict[str, Path]) -> None:
    """The one with a folder in it."""
    out = of_one_rank[BF16]
    assert (out / "additional_chat_templates").is_dir()
    assert Trace(out.with_name("outcomes.json.trace")).lacks(out) == []


@pytest.mark.parametrize("name", [*MODELS, BF16])
def test_export_is_the_same_from_the_weights_alone_of_tensor_pipeline_and_expert_parallel_ranks(
    of_four_ranks: dict[str, Path], folders: dict[str, Path], models: Path, name: str
) -> None:
    assert differences(of_four_ranks[name], folders[BF16] if name == BF16 else models / name) == []
    # The template of the training data is the exported folder's only one.
    assert (of_four_ranks[name] / "chat_template.jinja").read_text() == GIVEN.text
    assert not (of_four_ranks[name] / "additional_chat_templates").exists()


@pytest.mark.real_model
def test_a_real_model_is_exported_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    folder = real_model()
    outs = publish_and_export(trainer, {"real": folder}, "real", 1, tmp_path)
    assert differences(outs["real"], folder) == []
    shutil.rmtree(outs["real"])


def run_tool(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, last line of standard output and standard error of the real command."""
    environment = dict(os.environ, PYTHONWARNINGS="error", OMP_NUM_THREADS="1")
    argv = [sys.executable, "-m", "sftd.trainer.tools.export", *arguments]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, lines[-1] if lines else {}, done.stderr


def test_a_trained_model_answers_in_transformers_as_it_did_in_training(
    trainer: Trainer, models: Path, tmp_path: Path
) -> None:
    run = trainer.run("experts_ep2", 2, **overrides_of(models, **EP2))
    published = run.events(CheckpointPublished)[-1]
    out = tmp_path / "model"
    arguments = [
        str(run.attempt.order_file),
        published.path,
        str(out),
        "--digest",
        published.manifest_digest,
    ]
    code, done, _ = run_tool([*arguments, "--max-shard-bytes", "200000"])
    assert code == 0
    files = sorted(p for p in out.iterdir())
    lines = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files)
    assert done == {
        "event": "done",
        "path": str(out),
        "step": published.step,
        "files": len(files),
        "bytes": sum(p.stat().st_size for p in files),
        "parameters": run.events(ModelLoaded)[0].parameters,
        "dtype": "float32",
        "digest": hashlib.sha256(lines.encode()).hexdigest(),
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in out.glob("*.safetensors")}
    assert len(list(out.glob("model-0000?-of-0000?.safetensors"))) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert model.dtype == torch.float32
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    new = answer[0, prompt["input_ids"].shape[1] :]
    sampled = run.events(SampleGenerated)
    assert sampled[-1].step == published.step
    assert (sampled[-1].text, sampled[-1].tokens) == (
        tokenizer.decode(new, skip_special_tokens=True),
        len(new),
    )
    assert sampled[-1].text != sampled[0].text, "training has changed nothing"


def test_what_is_refused_leaves_nothing(trainer: Trainer, base: Run, tmp_path: Path) -> None:
    order, good = str(base.attempt.order_file), base.checkpoint(6)
    damaged = tmp_path / "step-00000006"
    shutil.copytree(good, damaged)
    weights = next(damaged.glob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    # As another tool may leave it: the digests fit.
    odd = tmp_path / "odd" / "step-00000006"
    shutil.copytree(good, odd)
    (odd / ".metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    files = manifests.describe(odd, manifests.list_files(odd))
    manifest = msgspec.structs.replace(manifests.read(odd, None), files=files)
    (odd / manifests.NAME).write_bytes(manifests.encode(manifest))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    out = tmp_path / "out"
    outcomes = export_all(
        trainer,
        [
            [order, str(damaged), str(out)],
            [order, str(odd), str(out)],
            [order, str(good), str(out), "--digest", "0" * 64],
            [order, str(tmp_path / "none"), str(out)],
            [order, str(good), str(taken)],
            [str(tmp_path / "none.json"), str(good), str(out)],
        ],
        tmp_path,
    )
    assert [code for code, _ in outcomes] == [2] * 6
    says = [
        weights.name,
        "it names os.system, which does not describe a checkpoint",
        "not the one that was published",
        "manifest.json cannot be read",
        "already exists",
        "none.json",
    ]
    for (_, message), text in zip(outcomes, says, strict=True):
        assert text in message
    assert not out.exists()
    assert [p.name for p in taken.iterdir()] == ["mine"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
