"""A mixture of sources reads the same rows in every layout and after a resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import CheckpointPublished
from tests.builders.trainer.resumes import exact, resume
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from pathlib import Path

    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"training__use_rmpad": True, "training__micro_batch_size_per_gpu": 2}),
    "tp2": (2, {MEGATRON + "tensor_model_parallel_size": 2, MEGATRON + "sequence_parallel": True}),
}


def mixture(data: Path) -> dict[str, Any]:
    """The small file is read more often than the large one at first, and has three epochs within the run."""
    sources = [
        {"name": "large", "files": [str(data / "train.parquet")], "weight": 1.0},
        {
            "name": "small",
            "files": [str(data / "val.parquet")],
            "weight": 0.5,
            "val_files": [str(data / "val.parquet")],
        },
    ]
    return {
        "data__train_files": [],
        "data__val_files": [],
        "data__sources": sources,
        "data__stages": [{"until_step": 4, "weights": {"small": 3.0}}],
    }


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer, data: Path) -> Run:
    return trainer.run("mixture", 1, **mixture(data))


def test_each_step_reads_its_shares(one_rank: Run) -> None:
    rows = [{n: f.rows for n, f in (s.sources or {}).items()} for s in one_rank.steps().values()]
    assert rows == [{"large": 2, "small": 6}] * 4 + [{"large": 5, "small": 3}, {"large": 6, "small": 2}]
    assert [s.epoch for s in one_rank.steps().values()] == [0] * 6
    for step in one_rank.steps().values():
        parts = (step.sources or {}).values()
        assert sum(f.tokens * f.loss for f in parts) / step.tokens == pytest.approx(step.loss, rel=1e-6)
    assert {*(one_rank.validations()[6].sources or {})} == {"small"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_reads_the_same_rows(trainer: Trainer, data: Path, one_rank: Run, name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    run = trainer.run(f"mixture_{name}", ranks, **mixture(data), **overrides)
    for step, expected in one_rank.steps().items():
        found = run.steps()[step]
        assert found.samples_digest == expected.samples_digest
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        for source, figures in (expected.sources or {}).items():
            assert (found.sources or {})[source].loss == pytest.approx(figures.loss, rel=1e-5)


def test_a_resume_goes_on_with_the_rows_of_each_source(
    trainer: Trainer, warm: WarmTrainer, data: Path, one_rank: Run
) -> None:
    resumed = resume(trainer, warm, "mixture_resumed", one_rank, 3, **mixture(data))
    assert exact(resumed) == {step: numbers for step, numbers in exact(one_rank).items() if step > 3}
    figures = {step: s.sources for step, s in one_rank.steps().items() if step > 3}
    assert {s.step: s.sources for s in resumed.steps().values()} == figures


def test_steps_are_computed_again_without_validation_rows(
    trainer: Trainer, warm: WarmTrainer, data: Path, one_rank: Run
) -> None:
    published = next(e for e in one_rank.events(CheckpointPublished) if e.step == 3)
    attempt = trainer.prepare(
        "mixture_again",
        trainer.spec(1, **mixture(data)),
        checkpoint=published.path,
        checkpoint_digest=published.manifest_digest,
        checkpoint_dir=one_rank.attempt.order().checkpoint_dir,
        last_step=5,
    )
    again = trainer.train(warm, attempt)
    assert exact(again) == {step: numbers for step, numbers in exact(one_rank).items() if step in (4, 5)}
    assert not again.validations()
