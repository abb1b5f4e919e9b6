"""`optimizer.precision: lean` in real attempts: what a checkpoint holds, exact resume, and layouts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sftd.domain.log.events import CheckpointPublished, ModelLoaded
from sftd.domain.plan.sizes import checkpoint_bytes
from sftd.wire.checkpoint import reduction
from tests.builders.trainer.checkpoint_files import contents, tensors
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

    Trained = Callable[[str], Run]

LEAN: dict[str, Any] = {
    "optimizer__precision": "lean",
    "data__val_files": [],
    "trainer__max_steps": 3,
    "trainer__save_interval": 1,
}
TP2 = {MEGATRON + "tensor_model_parallel_size": 2}
PP2 = {MEGATRON + "pipeline_model_parallel_size": 2}
EP2 = {MEGATRON + "expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "tp2_sp": (2, TP2 | {MEGATRON + "sequence_parallel": True}),
}
# The gradient does not move the weights; decay does, by about a BF16 step, which the random bits round.
DECAY_ONLY: dict[str, Any] = {
    "optimizer__adam_eps": 1e30,
    "optimizer__lr": 1e-2,
    "optimizer__weight_decay": 0.3,
    "scheduler__type": "constant",
    "scheduler__warmup_steps": 0,
    "trainer__max_steps": 2,
    "trainer__save_interval": 2,
}


@pytest.fixture(scope="module")
def lean(trainer: Trainer, warm: WarmTrainer) -> Trained:
    """Undisturbed runs by layout."""

    def train(layout: str) -> Run:
        ranks, sizes = LAYOUTS[layout]
        return trainer.train(warm, trainer.prepare(f"lean-{layout}", trainer.spec(ranks, **LEAN | sizes)))

    return cache(train)


def resumed(trainer: Trainer, warm: WarmTrainer, run: Run, step: int, layout: str, **overrides: Any) -> Run:
    ranks, sizes = LAYOUTS[layout]
    event = next(e for e in run.events(CheckpointPublished) if e.step == step)
    order = {"checkpoint": event.path, "checkpoint_digest": event.manifest_digest}
    name = f"{run.attempt.path.name}-to-{layout}"
    return trainer.train(
        warm, trainer.prepare(name, trainer.spec(ranks, **LEAN | sizes | overrides), **order)
    )


def losses(run: Run) -> dict[int, float]:
    return {n: step.loss for n, step in run.steps().items()}


def test_a_checkpoint_holds_six_bytes_a_parameter(lean: Trained) -> None:
    run = lean("one")
    loaded, spec = run.events(ModelLoaded)[0], run.attempt.order().spec
    assert loaded.dtype == "bfloat16"
    found = tensors(run.checkpoint(3))
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert {name.split(".")[2] for name in found if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
    }
    size = sum(x.numel() * x.element_size() for x in found.values())
    assert size == checkpoint_bytes(spec, "bfloat16") * loaded.parameters == 6 * loaded.parameters


def test_clipping_reaches_the_lean_optimizer(lean: Trained) -> None:
    """The first moment after a step is a tenth of the clipped gradient."""
    run = lean("one")
    assert run.steps()[1].grad_norm > 1.3
    moments = [x for name, x in tensors(run.checkpoint(1)).items() if ".exp_avg." in name]
    assert float(torch.cat([x.flatten() for x in moments]).double().norm()) == pytest.approx(0.1, rel=1e-3)


# With a pipeline each end has a copy of the tied embedding. A checkpoint has the first: they must not drift apart.
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_resume_is_bit_for_bit(trainer: Trainer, warm: WarmTrainer, lean: Trained, layout: str) -> None:
    whole = lean(layout)
    again = resumed(trainer, warm, whole, 1, layout)
    assert losses(again) == {n: loss for n, loss in losses(whole).items() if n > 1}
    assert contents(again, 3) == contents(whole, 3)


def test_data_parallel_ranks_train_as_one(lean: Trained) -> None:
    """Their shares begin anywhere in a parameter. Only the gradient's sum differs, in FP32."""
    assert list(losses(lean("dp2")).values()) == pytest.approx(list(losses(lean("one")).values()), rel=1e-7)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_another_layout_goes_on(trainer: Trainer, warm: WarmTrainer, lean: Trained, layout: str) -> None:
    whole, run = losses(lean("one")), resumed(trainer, warm, lean("dp2"), 2, layout)
    # As near as BF16 layouts with FP32 weights are.
    assert losses(run) == pytest.approx({3: whole[3]}, rel=3e-4)


@pytest.mark.parametrize(
    ("model", "layouts"), [("llama_tied", ("dp2", "tp2", "pp2")), ("mixtral", ("ep2", "tp2_sp"))]
)
def test_random_bits_do_not_depend_on_the_layout(
    trainer: Trainer, warm: WarmTrainer, models: Path, model: str, layouts: tuple[str, ...]
) -> None:
    def weights(layout: str) -> dict[str, torch.Tensor]:
        ranks, sizes = LAYOUTS[layout]
        given: dict[str, Any] = LEAN | DECAY_ONLY | sizes | {"model__partial_pretrain": str(models / model)}
        attempt = trainer.prepare(f"decayed-{model}-{layout}", trainer.spec(ranks, **given))
        found = tensors(trainer.train(warm, attempt).checkpoint(2))
        return {name: x for name, x in found.items() if not name.startswith("optimizer.")}

    one = weights("one")
    for layout in layouts:
        other = weights(layout)
        assert other.keys() == one.keys()
        different = [name for name, x in other.items() if not torch.equal(x, one[name])]
        assert not different, layout


def test_an_export_of_the_weights_alone_has_them(trainer: Trainer, lean: Trained, tmp_path: Path) -> None:
    run = lean("one")
    whole = tmp_path / run.checkpoint(3).name
    shutil.copytree(run.checkpoint(3), whole)
    event = next(e for e in run.events(CheckpointPublished) if e.step == 3)
    weights = reduction.reduce(whole, event.manifest_digest)
    assert weights is not None
    # Two of three tensors go.
    assert weights.freed / event.bytes == pytest.approx(2 / 3, abs=0.05)
    argv = [sys.executable, "-m", "sftd.trainer.tools.export", run.attempt.order_file, weights.path]
    done = subprocess.run(
        [*argv, tmp_path / "out"], env=trainer.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, trained = load_file(tmp_path / "out/model.safetensors"), tensors(run.checkpoint(3))
    pairs = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
    }
    assert all(torch.equal(found[a], trained[b]) for a, b in pairs.items())
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
