"""A model of each family on GPUs: in FP32 the numbers of the CPU, in BF16 packed as padded, and on two GPUs those of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import SampleGenerated
from sftd.wire.model.folder import read_shape
from tests.builders.paths import RANKS
from tests.builders.trainer.family_layouts import FIRST, LAYOUTS, ONE_RANK, refusal
from tests.builders.trainer.tiny_models import PROMPT
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer

pytestmark = pytest.mark.gpu

TOGETHER = RANKS / "together_ranks.py"
FP32: dict[str, Any] = ONE_RANK | {
    MEGATRON + "params_dtype": "float32",
    "trainer__sample_prompts": [PROMPT],
    "trainer__sample_max_tokens": 12,
}
BF16: dict[str, dict[str, Any]] = {
    "padded": ONE_RANK,
    "packed": ONE_RANK | {"training__use_rmpad": True},
    "exact": ONE_RANK | {"training__use_rmpad": True, "training__deterministic": True},
}
BF16["again"] = BF16["exact"]


def train(trainer: Trainer, variants: dict[str, dict[str, Any]], ranks: int = 1) -> dict[str, Run]:
    """Runs by `variant-model`, each model in each variant that is not refused."""
    attempts = {}
    for variant, given in variants.items():
        for name in FIRST.values():
            folder = str(trainer.models / name)
            if ranks == 1 or not refusal(read_shape(folder, {}), given):
                spec = trainer.spec(ranks, model__partial_pretrain=folder, **given)
                attempts[f"{variant}-{name}"] = trainer.prepare(f"families-{ranks}-{variant}-{name}", spec)
    return trainer.together(attempts, TOGETHER)


@pytest.fixture(scope="module")
def on_the_cpu(on_cpu: Trainer) -> dict[str, Run]:
    return train(on_cpu, {"fp32": FP32})


@pytest.fixture(scope="module")
def one(on_gpu: Trainer) -> dict[str, Run]:
    return train(on_gpu, {"fp32": FP32, **BF16})


def losses(run: Run) -> list[float]:
    return [step.loss for step in run.steps().values()]


@pytest.mark.parametrize("name", FIRST.values())
def test_fp32_agrees_with_the_cpu(one: dict[str, Run], on_the_cpu: dict[str, Run], name: str) -> None:
    gpu, cpu = one[f"fp32-{name}"], on_the_cpu[f"fp32-{name}"]
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-4)
    assert [s.text for s in gpu.events(SampleGenerated)] == [s.text for s in cpu.events(SampleGenerated)]


@pytest.mark.parametrize("name", FIRST.values())
def test_bf16_trains_padded_and_packed_alike(one: dict[str, Run], name: str) -> None:
    padded, packed = one[f"padded-{name}"], one[f"packed-{name}"]
    assert losses(packed) == pytest.approx(losses(padded), rel=2e-2)
    assert losses(padded) == pytest.approx(losses(one[f"fp32-{name}"]), rel=2e-2)


@pytest.mark.parametrize("name", FIRST.values())
def test_deterministic_training_repeats_its_bits(one: dict[str, Run], name: str) -> None:
    first, again = (
        [(s.loss, s.grad_norm) for s in one[f"{variant}-{name}"].steps().values()]
        for variant in ("exact", "again")
    )
    assert first == again


# Those in which GPUs run other code than CPUs: attention to a part of a row, and the experts of other ranks.
@pytest.mark.parametrize("layout", ["CP", "EP"])
def test_two_gpus_agree_with_one(on_gpu: Trainer, gpus: int, one: dict[str, Run], layout: str) -> None:
    if gpus < 2:
        pytest.skip("one GPU on this machine: layouts of two were not run")
    for name, two in train(on_gpu, {layout: LAYOUTS[layout]}, ranks=2).items():
        reference = one[f"packed-{name.removeprefix(layout + '-')}"]
        assert losses(two) == pytest.approx(losses(reference)[:2], rel=2e-2), name
