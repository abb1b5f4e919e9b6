"""A model family is an entry and a module: one that no product file knows is accepted, planned, trained and exported. The
families that sftd has train and answer as in transformers, and in each layout as on one rank."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.errors import Refused
from sftd.domain.log.events import SampleGenerated, StepCompleted
from sftd.domain.model.families import FAMILIES
from sftd.domain.model.parameters import held, whole_model
from sftd.domain.model.weights import folder_names, layer_weights
from sftd.domain.plan.duration import Machine
from sftd.domain.plan.plan import PlanInputs, make_plan
from sftd.wire import preflight
from sftd.wire.model.folder import read_shape
from tests.builders.paths import RANKS, ROOT
from tests.builders.ranks.toy_family import LR, ROWS, TOY, toy_name
from tests.builders.trainer.family_layouts import FIRST, LAYOUTS, ONE_RANK, refusal
from tests.builders.trainer.plain import Plain, Settings
from tests.builders.trainer.tiny_models import MODELS, PROMPT
from tests.builders.trainer.transformers_loop import reference

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

SCRIPT = RANKS / "toy_family.py"
# One batch: a row that ends after others, and one that is longer than the windows.
ASKED = [PROMPT, "a", "".join(chr(40 + n) for n in range(30))]
ANSWERS = {"trainer__sample_prompts": ASKED, "trainer__sample_max_tokens": 12}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 251}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as transformers knows it, and as a toy."""
    root = tmp_path_factory.mktemp("toy")
    llama, toy = root / "llama", root / "toy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
        from safetensors.torch import load_file, save_file

        config = transformers.LlamaConfig(
            **SIZES, hidden_size=32, intermediate_size=48, attention_bias=True, tie_word_embeddings=False
        )
        torch.manual_seed(5)
        network = transformers.LlamaForCausalLM(config).float()
        with torch.no_grad():
            for parameter in network.parameters():
                # Also what starts at one or zero, which would hide a wrong mapping.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        network.save_pretrained(llama)
        toy.mkdir()
        weights = {toy_name(name): value for name, value in load_file(llama / "model.safetensors").items()}
        save_file(weights, toy / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((llama / "config.json").read_text())
    settings |= {"architectures": [TOY.architecture], "model_type": "toy"}
    settings["ffn_dim"] = settings.pop("intermediate_size")
    (toy / "config.json").write_text(json.dumps(settings))
    return llama, toy


@pytest.fixture
def toy(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy's folder, and its entry."""
    monkeypatch.setitem(FAMILIES, TOY.architecture, TOY)
    return folders[1]


@pytest.fixture(scope="module")
def trained(trainer: Trainer, folders: tuple[Path, Path]) -> Run:
    """What two tensor-parallel ranks made of it."""
    spec = trainer.spec(
        2,
        model__partial_pretrain=str(folders[1]),
        model__megatron__tensor_model_parallel_size=2,
        model__megatron__sequence_parallel=True,
        training__micro_batch_size_per_gpu=len(ROWS),
        data__train_batch_size=len(ROWS),
        optimizer__weight_decay=0.0,
    )
    attempt = trainer.prepare("toy", spec)
    return trainer.finish(attempt, trainer.start(attempt, script=SCRIPT))


def found(run: Run) -> Any:
    return json.loads((run.attempt.path / "found.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_knows_the_names_and_sizes_of_a_folders_weights(models: Path, name: str) -> None:
    from safetensors import safe_open

    shape = read_shape(str(models / name), {})
    sizes: Counter[tuple[int, str]] = Counter()
    for layer in range(shape.num_hidden_layers):
        for weight in layer_weights(shape, layer):
            # Several projections, and the experts of a layer, may be one tensor.
            count = shape.num_experts if weight.is_joined else 1
            sizes[layer, weight.name] += weight.rows * weight.columns * count
    with safe_open(models / name / "model.safetensors", "pt") as weights:
        found = {key: weights.get_tensor(key).numel() for key in weights.keys()}  # noqa: SIM118
    planned = list(folder_names(shape))
    assert {full_name for _, _, full_name, _ in planned} == found.keys()
    for layer, name, full_name, _ in planned:
        assert layer < 0 or found[full_name] == sizes[layer, name], full_name


def test_without_its_entry_the_family_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(Refused, match="ToyForCausalLM is not supported"):
        read_shape(str(folders[1]), {})


def test_the_family_is_accepted_and_planned(trainer: Trainer, toy: Path, tmp_path: Path) -> None:
    spec = trainer.spec(model__partial_pretrain=str(toy), model__override_config={"ffn_dim": 48})
    seen = preflight.inspect(spec, home=tmp_path)
    assert (seen.shape.intermediate_size, seen.shape.unsupported) == (48, ())
    facts = PlanInputs(shape=seen.shape, train=seen.train, val=seen.val, planned_steps=seen.planned_steps)
    plan = make_plan(spec, facts, Machine(device="cpu", name="cpu"))
    assert plan.memory[0].weights == 4 * whole_model(seen.shape)


def test_its_loss_and_gradients_are_those_of_a_reference(trained: Run, folders: tuple[Path, Path]) -> None:
    reference, o = Plain(folders[0]), trained.attempt.order().spec.optimizer
    settings = Settings(LR, 0.0, (o.adam_beta1, o.adam_beta2), o.adam_eps, o.clip_grad)
    for _ in range(2):
        reference.step(ROWS, settings)
    steps = found(trained)["steps"]
    assert [loss for loss, _ in steps] == pytest.approx(reference.losses, rel=1e-5)
    assert [norm for _, norm in steps] == pytest.approx(reference.norms, rel=1e-4)
    assert steps[1][0] < steps[0][0]


def test_a_plan_counts_its_parameters(trained: Run, toy: Path) -> None:
    spec, shape = trained.attempt.order().spec, read_shape(str(toy), {})
    assert found(trained)["parameters"] == whole_model(shape)
    assert found(trained)["held"] == held(spec, shape, 0).total


def test_an_export_has_every_bit_that_was_loaded(trainer: Trainer, trained: Run, toy: Path) -> None:
    out, attempt = trained.attempt.path / "out", trained.attempt
    argv = [sys.executable, str(SCRIPT), str(attempt.order_file), str(trained.checkpoint(1)), str(out)]
    done = subprocess.run(argv, env=trainer.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (toy / "model.safetensors").read_bytes()
    assert read_shape(str(out), {}) == read_shape(str(toy), {})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_each_family_is_compared_with_transformers(family: Any) -> None:
    assert family.architecture in FIRST


def test_the_page_of_the_models_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts/models.py"))["markdown"]()
    assert (ROOT / "docs/models.md").read_text() == made, "python scripts/models.py > docs/models.md"


@pytest.fixture(scope="module")
def runs_of(
    request: pytest.FixtureRequest, trainer: Trainer, warm: WarmTrainer, models: Path
) -> Callable[[str], dict[str, Run]]:
    """The runs of a layout ("" for one rank) by model, of the models that the selected tests name; each layout is trained once."""
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec") and "name" in item.callspec.params
    }
    begun: set[str] = set()

    @cache
    def find(layout: str) -> dict[str, Run]:
        assert layout not in begun, f"the ranks of {layout or 'one rank'} have failed: see the first test"
        begun.add(layout)
        keys = LAYOUTS.get(layout, ONE_RANK | ANSWERS)
        attempts = {}
        for name in [name for name in MODELS if name in chosen and (not layout or name in FIRST.values())]:
            if not (layout and refusal(read_shape(str(models / name), {}), keys)):
                spec = trainer.spec(2 if layout else 1, model__partial_pretrain=str(models / name), **keys)
                attempts[name] = trainer.prepare(f"family_{layout}_{name}", spec)
        return trainer.together(attempts, RANKS / "layouts_ranks.py", warm)

    return find


@pytest.mark.parametrize("name", MODELS)
def test_five_steps_and_answers_after_them_are_those_of_transformers(
    runs_of: Callable[[str], dict[str, Run]], name: str
) -> None:
    run = runs_of("")[name]
    losses, norms, network = reference(run, 5)
    steps = run.events(StepCompleted)
    assert [s.loss for s in steps] == pytest.approx(losses, rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            run.attempt.order().spec.model.partial_pretrain
        )
        found = {sample.prompt: (sample.text, sample.tokens) for sample in run.events(SampleGenerated)}
        for asked in ASKED:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt"
            )
            answer = network.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
            new = answer[0, prompt["input_ids"].shape[1] :]
            assert found[asked] == (tokenizer.decode(new, skip_special_tokens=True), len(new)), asked


@pytest.mark.parametrize("name", FIRST.values())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_a_family_as_one_rank_does_or_is_refused(
    runs_of: Callable[[str], dict[str, Run]], models: Path, layout: str, name: str
) -> None:
    shape = read_shape(str(models / name), {})
    if refusal(shape, LAYOUTS[layout]):
        # As docs/models.md says.
        return
    run, one = runs_of(layout)[name], runs_of("")[name]
    for step, event in run.steps().items():
        assert event.loss == pytest.approx(one.steps()[step].loss, rel=1e-5)
        assert event.grad_norm == pytest.approx(one.steps()[step].grad_norm, rel=1e-4)
    assert len(run.steps()) == 2
    spec = run.attempt.order().spec
    for rank in range(spec.world_size):
        left = json.loads((run.attempt.path / f"held-{rank}.json").read_text())
        assert left["weights"] == left["gradients"] == held(spec, shape, left["stage"]).total
