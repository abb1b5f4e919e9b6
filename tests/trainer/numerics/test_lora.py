"""Adapters and frozen weights: five steps against peft on transformers, every layout against one rank, exact resumes, checkpoints of what
is trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import CheckpointPublished, ModelLoaded, WeightsDigested
from sftd.domain.model.parameters import trained_parameters, whole_model
from sftd.domain.plan.disk import storage
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.model.folder import read_shape
from tests.builders.trainer.adapters import assert_same_steps, assert_trains_like, export, write_adapter
from tests.builders.trainer.plain import Plain
from tests.builders.trainer.resumes import exact, resume, weights_digests
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

TP2, PP2, CP2, EP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2}
    for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
)
VPP2 = PP2 | {MEGATRON + "virtual_pipeline_model_parallel_size": 2}
SP = {MEGATRON + "sequence_parallel": True}
PACKED = {"training__use_rmpad": True}
FULL = {"model__enable_gradient_checkpointing": True}
LORA: dict[str, Any] = {"model__lora__rank": 4, "optimizer__lr": 1e-2}
FREEZE: dict[str, Any] = {"model__freeze": ["embed_tokens", r"\.layers\.0\.", r"layers\.3\.mlp"]}
# What is trained in one rank: model, overrides.
ONE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama_tied", LORA),
    "dropout": (
        "qwen2",
        LORA | {"model__lora__dropout": 0.2, "model__lora__targets": ["q", "v", "o", "down"]},
    ),
    "experts": ("qwen3_moe", LORA),
    "frozen": ("llama", FREEZE),
}
# Which of them, ranks, overrides.
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2_packed": ("lora", 2, PACKED),
    "tp2": ("lora", 2, TP2),
    "tp2_sp_full": ("lora", 2, TP2 | SP | FULL),
    "pp2_vpp2_full": ("lora", 2, VPP2 | FULL),
    "cp2": ("lora", 2, CP2 | PACKED),
    "half_full_half_selective": ("lora", 1, FULL | {"model__recompute_layers": 2}),
    "dropout_tp2_sp_packed": ("dropout", 2, TP2 | SP | PACKED),
    "dropout_tp2_full": ("dropout", 2, TP2 | FULL),
    "dropout_cp2": ("dropout", 2, CP2),
    "dropout_pp2": ("dropout", 2, PP2),
    "experts_ep2": ("experts", 2, EP2),
    "experts_tp2": ("experts", 2, TP2 | SP),
    "experts_tp2_ep2": ("experts", 2, TP2 | SP | EP2),
    "frozen_pp2_full": ("frozen", 2, PP2 | FULL),
    "frozen_tp2": ("frozen", 2, TP2),
}

# Models whose five steps are compared with peft's.
PEFT = ("llama_tied", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen3_5")


def train(
    trainer: Trainer, warm: WarmTrainer, name: str, model: str, ranks: int = 1, **overrides: Any
) -> Run:
    folder = str(trainer.models / model)
    spec = trainer.spec(ranks, model__partial_pretrain=folder, **overrides)
    return trainer.train(warm, trainer.prepare(f"lora_{name}", spec))


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer, warm: WarmTrainer) -> dict[str, Run]:
    return {name: train(trainer, warm, name, model, **given) for name, (model, given) in ONE.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(
    trainer: Trainer, warm: WarmTrainer, one_rank: dict[str, Run], layout: str
) -> None:
    name, ranks, overrides = LAYOUTS[layout]
    model, given = ONE[name]
    run, expected = train(trainer, warm, layout, model, ranks, **given, **overrides), one_rank[name]
    assert_same_steps(run, expected)
    (loaded,), (other) = run.events(ModelLoaded), expected.events(ModelLoaded)
    assert (loaded.parameters, loaded.trained_parameters) == (
        other[0].parameters,
        other[0].trained_parameters,
    )


@pytest.mark.parametrize("model", PEFT)
def test_five_steps_are_those_of_peft(
    trainer: Trainer, warm: WarmTrainer, models: Path, tmp_path: Path, model: str
) -> None:
    folder = write_adapter(models / model, tmp_path / "adapter", alpha=4)
    given = LORA | {"model__lora__adapter": str(folder), "trainer__max_steps": 5, "data__shuffle": False}
    if "moe" in model or model == "mixtral":
        # peft's all-linear leaves out the experts, whose weights are no modules in transformers.
        given |= {"model__lora__targets": ["q", "k", "v", "o"]}
    run = train(
        trainer, warm, f"peft_{model}", model, **given | {"optimizer__lr": 1e-3, "model__lora__alpha": 4}
    )
    assert_trains_like(run, Plain(models / model, folder))


@pytest.mark.parametrize("name", ["dropout", "frozen"])
def test_a_resume_goes_on_bit_for_bit(
    trainer: Trainer, warm: WarmTrainer, one_rank: dict[str, Run], name: str
) -> None:
    model, given = ONE[name]
    folder = str(trainer.models / model)
    resumed = resume(
        trainer, warm, f"lora_{name}_3", one_rank[name], 3, model__partial_pretrain=folder, **given
    )
    assert exact(resumed) == {step: s for step, s in exact(one_rank[name]).items() if step > 3}
    assert weights_digests(resumed, 6) == weights_digests(one_rank[name], 6)


@pytest.fixture(scope="module")
def exported(trainer: Trainer, one_rank: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the adapter as a PEFT folder, and of the model with it merged."""
    root = tmp_path_factory.mktemp("exported")
    export(trainer, one_rank["lora"], 6, root / "adapter")
    export(trainer, one_rank["lora"], 6, root / "merged", "--merge")
    return root


def test_peft_loads_the_adapter_and_merging_changes_nothing(exported: Path, models: Path) -> None:
    import torch

    tokens = torch.arange(3, 40)[None]
    own = Plain(models / "llama_tied", exported / "adapter")
    with torch.no_grad():
        found, other, before = (
            model.network.eval()(input_ids=tokens).logits
            for model in (own, Plain(exported / "merged"), Plain(models / "llama_tied"))
        )
    assert (found - other).abs().max() < 1e-4
    assert (found - before).abs().max() > 1e-2


def test_a_checkpoint_holds_the_adapter_alone(one_rank: dict[str, Run]) -> None:
    """And names the weights that it goes with."""
    run = one_rank["lora"]
    files = run.checkpoint(6).rglob("*")
    assert sum(f.stat().st_size for f in files) < 1_000_000
    (published,) = [event for event in run.events(CheckpointPublished) if event.step == 6]
    manifest = manifests.verify(run.checkpoint(6), published.manifest_digest)
    assert manifest.base == run.events(WeightsDigested)[0].files


def test_a_plan_counts_what_is_trained(one_rank: dict[str, Run]) -> None:
    run = one_rank["lora"]
    spec = run.attempt.order().spec
    shape = read_shape(spec.model.partial_pretrain, {})
    trained = trained_parameters(spec.model, shape)
    (loaded,) = run.events(ModelLoaded)
    assert (loaded.trained_parameters, loaded.parameters) == (trained, whole_model(shape) + trained)
    # Weights and optimizer state, and a little for each A and B of seven projections in four layers.
    size = sum(file.stat().st_size for file in run.checkpoint(6).rglob("*"))
    planned = storage(spec, shape, 6, "float32").checkpoint
    assert planned < size < planned + 8_000 * 2 * 7 * 4
