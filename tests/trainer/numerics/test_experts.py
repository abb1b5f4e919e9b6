"""Mixture of experts: the steps against transformers, in every layout, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import ModelLoaded, SampleGenerated
from sftd.domain.model.parameters import trained_parameters, whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Model
from sftd.wire.model.folder import read_shape
from tests.builders.paths import RANKS
from tests.builders.trainer.experts import EP2, overrides_of
from tests.builders.trainer.resumes import exact, resume, weights_digests
from tests.builders.trainer.tiny_models import WIDE, write_models
from tests.builders.trainer.trainers import MEGATRON
from tests.builders.trainer.transformers_loop import expert_load, reference

if TYPE_CHECKING:
    from pathlib import Path

    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

TP2 = {MEGATRON + "tensor_model_parallel_size": 2, MEGATRON + "sequence_parallel": True}
# Packing and recomputation are mixed in; with four ranks two hold the same experts.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, EP2),
    "ep2_of_tp2_dp2_packed": (
        4,
        EP2 | TP2 | {"training__use_rmpad": True, "training__micro_batch_size_per_gpu": 2},
    ),
    "ep2_packed_recompute": (
        2,
        EP2 | {"training__use_rmpad": True, "model__enable_gradient_checkpointing": True},
    ),
    "ep2_of_cp2_packed": (
        2,
        EP2 | {MEGATRON + "context_parallel_size": 2, "training__use_rmpad": True},
    ),
    "pp2": (2, {MEGATRON + "pipeline_model_parallel_size": 2}),
}
SHORT: dict[str, Any] = {"trainer__max_steps": 3, "trainer__save_interval": 0, "data__val_files": []}
FULL: dict[str, Any] = {"model__enable_gradient_checkpointing": True}
LORA: dict[str, Any] = {"model__lora__rank": 4, "optimizer__lr": 1e-2}
FREEZE: dict[str, Any] = {"model__freeze": [r"0\.mlp\.experts\..*\.down", r"1\.mlp\.experts"]}
# What is trained one by one in one rank: model, overrides.
ONE_BY_ONE: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {}),
    "frozen": ("qwen3_moe", FREEZE),
    "lora": ("qwen3_moe", LORA),
    "qlora": ("qwen3_moe", LORA | {"model__quantize": "nf4"}),
}
# And together, as on GPUs: which of them, ranks, overrides.
TOGETHER: dict[str, tuple[str, int, dict[str, Any]]] = {
    "selective": ("whole", 1, FULL | {"model__recompute": "selective"}),
    "full_packed": ("mixtral", 1, FULL | {"training__use_rmpad": True}),
    "frozen": ("frozen", 1, {}),
    "qlora": ("qlora", 1, {}),
    "ep2": ("whole", 2, EP2),
    "lora_tp2": ("lora", 2, TP2),
}


SIGMOID = ModelShape(
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 1),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"), 1),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "qk_norm"), False),
    architecture="",
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    num_experts=8,
    num_experts_per_tok=3,
    router="sigmoid",
    routed_scaling_factor=2.5,
)


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer, models: Path) -> Run:
    return trainer.run("experts", 1, **overrides_of(models))


@pytest.fixture(scope="module")
def ep2(trainer: Trainer, models: Path) -> Run:
    return trainer.run("experts_ep2", 2, **overrides_of(models, **EP2))


def test_one_rank_equals_a_plain_pytorch_loop(one_rank: Run) -> None:
    balance: list[list[float]] = []
    losses, norms, _ = reference(one_rank, 5, balance)
    steps = list(one_rank.steps().values())[:5]
    assert [s.loss for s in steps] == pytest.approx(losses, rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-5)
    for step, expected in zip(steps, balance, strict=True):
        assert [step.load_balancing_loss, step.z_loss] == pytest.approx(expected, rel=1e-5)


def test_a_validation_says_which_share_the_fullest_expert_of_each_layer_has(one_rank: Run) -> None:
    spec = one_rank.attempt.order().spec
    rows = pq.read_table(spec.data.val_files[0])["input_ids"].to_pylist()
    found = one_rank.validations()[0].expert_load
    assert found == pytest.approx(expert_load(spec.model.partial_pretrain, rows), abs=1e-9)


def test_the_lowest_of_experts_with_equal_scores_is_chosen() -> None:
    import torch

    from sftd.trainer.model.moe.routing import route

    shape = msgspec.structs.replace(SIGMOID, router_groups=2, router_topk_group=1)
    weights, experts = route(torch.zeros(50, 8), shape, torch.zeros(8))
    assert experts.tolist() == [[0, 1, 2]] * 50
    assert weights.tolist() == [[pytest.approx(2.5 / 3)] * 3] * 50
    # The bias chooses the group and the experts, and is not part of the weights.
    bias = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.5, 0.0, 0.5])
    _, experts = route(torch.zeros(1, 8), shape, bias)
    assert experts.tolist() == [[5, 7, 4]]
    _, experts = route(torch.zeros(1, 8), SIGMOID, bias)
    assert experts.tolist() == [[2, 5, 7]]


def test_the_bias_of_a_router_keeps_its_bits_in_a_bf16_model() -> None:
    import torch

    from sftd.trainer.model.moe.routing import CorrectionBias

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), CorrectionBias(2, torch.device("cpu")))
    before = torch.tensor([1.0 + 2**-20, 0.1])
    model[1].values.copy_(before)
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[1].values, before)


def test_a_frozen_router_is_not_trained(models: Path) -> None:
    for name, frozen in {
        "qwen3_moe": 2 * 8 * 64,
        "deepseek_v3": 3 * 8 * 64,
        "gpt_oss": 2 * (4 * 64 + 4),
    }.items():
        shape = read_shape(str(models / name), {})
        assert trained_parameters(Model(freeze_router=True), shape) == whole_model(shape) - frozen


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing_but_rounding(
    trainer: Trainer, models: Path, one_rank: Run, name: str
) -> None:
    ranks, overrides = LAYOUTS[name]
    run = trainer.run(f"experts_{name}", ranks, **overrides_of(models, **overrides))
    for step, expected in one_rank.steps().items():
        found = run.steps()[step]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.load_balancing_loss == pytest.approx(expected.load_balancing_loss, rel=1e-5)
        assert found.z_loss == pytest.approx(expected.z_loss, rel=1e-5)
    for step, validation in one_rank.validations().items():
        assert run.validations()[step].loss == pytest.approx(validation.loss, rel=1e-5)
        # Rounding may turn the choice of a token.
        assert run.validations()[step].expert_load == pytest.approx(validation.expert_load, abs=0.002)
    assert run.events(ModelLoaded)[0].parameters == one_rank.events(ModelLoaded)[0].parameters
    assert run.events(ModelLoaded)[0].parameters == whole_model(read_shape(str(models / "qwen3_moe"), {}))
    texts = [(s.step, s.text) for s in one_rank.events(SampleGenerated)]
    assert [(s.step, s.text) for s in run.events(SampleGenerated)] == texts


def test_expert_parallel_ranks_go_on_bit_for_bit(
    trainer: Trainer, warm: WarmTrainer, models: Path, ep2: Run
) -> None:
    resumed = resume(
        trainer,
        warm,
        "experts_ep2-2",
        ep2,
        3,
        2,
        **overrides_of(models, **EP2),
    )
    assert exact(resumed) == {step: numbers for step, numbers in exact(ep2).items() if step > 3}
    assert weights_digests(resumed, 6) == weights_digests(ep2, 6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_number_of_expert_parallel_ranks_goes_on_within_rounding(
    trainer: Trainer, models: Path, one_rank: Run, ep2: Run, ranks: int
) -> None:
    first, layout = (one_rank, EP2) if ranks == 2 else (ep2, {})
    attempt = trainer.prepare(
        f"experts_to_{ranks}",
        trainer.spec(ranks, **overrides_of(models, **layout)),
        checkpoint=str(first.checkpoint(3)),
    )
    run = trainer.finish(attempt, trainer.start(attempt))
    assert set(run.steps()) == {4, 5, 6}
    for step, event in run.steps().items():
        assert event.loss == pytest.approx(one_rank.steps()[step].loss, rel=1e-5)
        assert event.grad_norm == pytest.approx(one_rank.steps()[step].grad_norm, rel=1e-5)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_models(folder, WIDE)
    return folder


Train = Callable[..., "Run"]


@pytest.fixture(scope="module")
def train(trainer: Trainer, warm: WarmTrainer, models: Path, wide: Path) -> Train:
    """Trains one of `ONE_BY_ONE` a few steps."""

    def run(name: str, which: str, ranks: int = 1, faults: Sequence[Any] = (), **more: Any) -> Run:
        model, overrides = ONE_BY_ONE[which]
        folder = wide if which == "qlora" else models
        given = SHORT | overrides | more | {"model__partial_pretrain": str(folder / model)}
        attempt = trainer.prepare(f"experts_{name}", trainer.spec(ranks, **given))
        return trainer.train(warm, attempt, faults=faults)

    return run


@pytest.fixture(scope="module")
def one_by_one(train: Train) -> Callable[[str], Run]:
    """The run of `ONE_BY_ONE` of that name."""
    return cache(lambda which: train(f"one_by_one_{which}", which))


@pytest.mark.parametrize("name", TOGETHER)
def test_experts_computed_together_train_as_one_by_one(
    train: Train, one_by_one: Callable[[str], Run], name: str
) -> None:
    which, ranks, overrides = TOGETHER[name]
    found, expected = (
        train(f"together_{name}", which, ranks, [("experts_together", {})], **overrides),
        one_by_one(which),
    )
    assert found.steps().keys() == expected.steps().keys()
    for step, event in expected.steps().items():
        assert found.steps()[step].loss == pytest.approx(event.loss, rel=2e-6)
        assert found.steps()[step].grad_norm == pytest.approx(event.grad_norm, rel=1e-5)


def test_experts_computed_together_are_right_and_the_same_again(warm: WarmTrainer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert warm.script(RANKS / "grouped_experts.py", [], 1, log).wait() == [0], log.read_text()
