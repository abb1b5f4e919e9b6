"""Adapters: five steps against peft on transformers, every layout against one rank, checkpoints of the adapter alone."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import CheckpointPublished, ModelLoaded, WeightsDigested
from sftd.domain.model.parameters import trained_parameters, whole_model
from sftd.domain.plan.disk import storage
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.model.folder import read_shape
from tests.builders.trainer.plain import Plain, Settings, usable

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer

MEGATRON = "model__megatron__"
TP2, PP2, CP2, EP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2}
    for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
)
SP = {MEGATRON + "sequence_parallel": True}
PACKED = {"training__use_rmpad": True}
FULL = {"model__enable_gradient_checkpointing": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2_packed": (2, PACKED),
    "tp2": (2, TP2),
    "tp2_sp_full": (2, TP2 | SP | FULL),
    "pp2_full": (2, PP2 | FULL),
    "pp2_vpp2": (2, PP2 | {MEGATRON + "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, CP2 | PACKED),
    "selective": (1, FULL | {"model__recompute": "selective"}),
    "packed": (1, PACKED),
}
LORA: dict[str, Any] = {"model__lora__rank": 4, "optimizer__lr": 1e-3}


@pytest.fixture(scope="module", params=["llama_tied"])
def peft_folder(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter with random A and B that peft has written."""
    return write_adapter(models / request.param, tmp_path_factory.mktemp("adapter"))


def write_adapter(model: Path, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers

        torch.manual_seed(5)
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = peft.LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(network, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer) -> Run:
    return trainer.run("lora_one", **LORA)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(trainer: Trainer, one_rank: Run, layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    run = trainer.run(f"lora_{layout}", ranks, **LORA, **overrides)
    for step, event in one_rank.steps().items():
        other = run.steps()[step]
        assert math.isclose(event.loss, other.loss, rel_tol=1e-5), (step, event.loss, other.loss)
        assert math.isclose(event.grad_norm, other.grad_norm, rel_tol=1e-4), step


def test_five_steps_are_those_of_peft(trainer: Trainer, models: Path, peft_folder: Path) -> None:
    run = trainer.run(
        "lora_peft", **LORA, model__lora__adapter=str(peft_folder), trainer__max_steps=5, data__shuffle=False
    )
    spec = run.attempt.order().spec
    o = spec.optimizer
    table = pq.read_table(spec.data.train_files[0]).to_pydict()
    rows = [row for _, row in usable(zip(table["input_ids"], table["labels"], strict=True), 64)]
    model = Plain(models / "llama_tied", peft_folder)
    for step, event in run.steps().items():
        settings = Settings(event.lr, o.weight_decay, (o.adam_beta1, o.adam_beta2), o.adam_eps, o.clip_grad)
        # The file has fewer rows than five steps: the last batch is filled from the next epoch.
        model.step([rows[i % len(rows)] for i in range(8 * step - 8, 8 * step)], settings)
        assert math.isclose(event.loss, model.losses[-1], rel_tol=1e-4), step
        assert math.isclose(event.grad_norm, model.norms[-1], rel_tol=1e-4), step
    assert len(model.losses) == 5


@pytest.fixture(scope="module")
def exported(trainer: Trainer, one_rank: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter as a PEFT folder, and the model with it merged."""
    root = tmp_path_factory.mktemp("exported")
    order, checkpoint = one_rank.attempt.order_file, one_rank.checkpoint(6)
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        argv = [
            sys.executable,
            "-m",
            "sftd.trainer.tools.export",
            str(order),
            str(checkpoint),
            str(root / name),
        ]
        subprocess.run([*argv, *options], env=trainer.environment(), check=True, stdout=subprocess.PIPE)
    return root / "adapter", root / "merged"


def test_peft_loads_the_adapter_and_merging_changes_nothing(
    exported: tuple[Path, Path], models: Path
) -> None:
    import torch

    adapter, merged = exported
    tokens = torch.arange(3, 40)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        own = Plain(models / "llama_tied", adapter).network.eval()
        whole = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        plain = transformers.AutoModelForCausalLM.from_pretrained(models / "llama_tied", dtype=torch.float32)
    with torch.no_grad():
        found, other, before = (m(input_ids=tokens).logits for m in (own, whole, plain))
    assert (found - other).abs().max() < 1e-4
    assert (found - before).abs().max() > 1e-2


def test_a_checkpoint_holds_the_adapter_alone(one_rank: Run) -> None:
    """And names the weights that it goes with."""
    files = one_rank.checkpoint(6).rglob("*")
    assert sum(f.stat().st_size for f in files) < 1_000_000
    (published,) = [event for event in one_rank.events(CheckpointPublished) if event.step == 6]
    manifest = manifests.verify(one_rank.checkpoint(6), published.manifest_digest)
    assert manifest.base == one_rank.events(WeightsDigested)[0].files


def test_a_plan_counts_what_is_trained(one_rank: Run) -> None:
    spec = one_rank.attempt.order().spec
    shape = read_shape(spec.model.partial_pretrain, {})
    trained = trained_parameters(spec.model, shape)
    (loaded,) = one_rank.events(ModelLoaded)
    assert (loaded.trained_parameters, loaded.parameters) == (trained, whole_model(shape) + trained)
    # Weights and optimizer state, and a little for each A and B of seven projections in four layers.
    size = sum(file.stat().st_size for file in one_rank.checkpoint(6).rglob("*"))
    planned = storage(spec, shape, 6, "float32").checkpoint
    assert planned < size < planned + 8_000 * 2 * 7 * 4
