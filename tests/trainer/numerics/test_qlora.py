"""Adapters beside a base in four bits: five steps against peft on the dequantised base, every layout, resumes, the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import ModelLoaded
from tests.builders.trainer.adapters import assert_same_steps, assert_trains_like, export, write_adapter
from tests.builders.trainer.plain import Plain
from tests.builders.trainer.resumes import exact, resume, weights_digests
from tests.builders.trainer.tiny_models import WIDE, write_models
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

QLORA: dict[str, Any] = {
    "model__quantize": "nf4",
    "model__lora__rank": 4,
    "optimizer__lr": 1e-3,
    "trainer__max_steps": 4,
    "trainer__save_interval": 2,
}
# The products that have no adapter are quantised as well.
SOME: dict[str, Any] = {"model__lora__targets": ["q", "down"]}
TP2, PP2, EP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "expert_model")
)
SP = {MEGATRON + "sequence_parallel": True}
PACKED = {"training__use_rmpad": True}
FULL = {"model__enable_gradient_checkpointing": True}
# Model, ranks, overrides.
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tp2_sp_full": ("llama", 2, TP2 | SP | FULL),
    "tp2_packed": ("llama", 2, TP2 | PACKED),
    "pp2_selective": ("llama", 2, PP2 | FULL | {"model__recompute": "selective"}),
    "dp2": ("llama", 2, {}),
    "ep2": ("qwen3_moe", 2, EP2),
    "experts_tp2_sp": ("qwen3_moe", 2, TP2 | SP),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_models(folder, WIDE)
    return folder


def overrides_of(wide: Path, model: str) -> dict[str, Any]:
    return QLORA | SOME | {"model__partial_pretrain": str(wide / model)}


def train(trainer: Trainer, warm: WarmTrainer, name: str, ranks: int = 1, **overrides: Any) -> Run:
    return trainer.train(warm, trainer.prepare(f"qlora_{name}", trainer.spec(ranks, **overrides)))


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer, warm: WarmTrainer, wide: Path) -> dict[str, Run]:
    return {model: train(trainer, warm, model, **overrides_of(wide, model)) for model in WIDE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(
    trainer: Trainer, warm: WarmTrainer, wide: Path, one_rank: dict[str, Run], layout: str
) -> None:
    model, ranks, overrides = LAYOUTS[layout]
    run, expected = (
        train(trainer, warm, layout, ranks, **overrides_of(wide, model), **overrides),
        one_rank[model],
    )
    assert_same_steps(run, expected)
    assert run.events(ModelLoaded)[0].parameters == expected.events(ModelLoaded)[0].parameters


def test_a_resume_goes_on_bit_for_bit(
    trainer: Trainer, warm: WarmTrainer, wide: Path, one_rank: dict[str, Run]
) -> None:
    first = one_rank["llama"]
    resumed = resume(trainer, warm, "qlora_llama-2", first, 2, **overrides_of(wide, "llama"))
    assert exact(resumed) == {step: numbers for step, numbers in exact(first).items() if step > 2}
    assert weights_digests(resumed, 4) == weights_digests(first, 4)


@pytest.fixture(scope="module")
def plain(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The model with dequantised weights under an adapter of peft."""
    import torch

    from sftd.trainer.model.quantize.nf4 import Quantized

    found = Plain(wide / "llama", write_adapter(wide / "llama", tmp_path_factory.mktemp("adapter"), alpha=32))
    for name, weight in found.network.named_parameters():
        if name.endswith("base_layer.weight"):
            stored = Quantized(weight.shape, weight.device)
            stored.fill(weight)
            weight.data.copy_(stored.dequantize(torch.float32))
    return found


def test_five_steps_are_those_of_peft_and_so_is_the_merged_model(
    trainer: Trainer, warm: WarmTrainer, wide: Path, plain: Plain, tmp_path: Path
) -> None:
    overrides = {
        "model__partial_pretrain": str(wide / "llama"),
        "model__lora__adapter": str(plain.adapter),
        "trainer__max_steps": 5,
        "trainer__save_interval": 5,
        "data__shuffle": False,
    }
    run = train(trainer, warm, "peft", **QLORA | overrides)
    assert_trains_like(run, plain)
    counted = sum(p.numel() for p in plain.network.parameters())
    assert run.events(ModelLoaded)[0].parameters == counted

    export(trainer, run, 5, tmp_path / "merged", "--merge")
    import torch

    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = Plain(tmp_path / "merged").network(input_ids=tokens).logits
        torch.testing.assert_close(logits, plain.network(input_ids=tokens).logits, rtol=1e-3, atol=1e-3)
