"""The steps of the trainer: against plain PyTorch, and undisturbed by what is done on the way (layouts: test_layouts.py)."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import (
    AnomalyDetected,
    CheckpointPublished,
    CheckpointStarted,
    DataBound,
    ModelLoaded,
    SampleGenerated,
    StepCompleted,
    ValidationCompleted,
    WeightsDigested,
)
from sftd.trainer.data.sample_order import SampleOrder, samples_digest
from tests.builders.trainer.tiny_models import real_model
from tests.builders.trainer.transformers_loop import reference

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_equals_a_plain_pytorch_loop(trainer: Trainer, base: Run, rows: str) -> None:
    packed = {"training__use_rmpad": True, "training__micro_batch_size_per_gpu": 4, "data__val_files": []}
    run = base if rows == "padded" else trainer.run("packed", **packed)
    losses, norms, _ = reference(run, 5)
    steps = run.events(StepCompleted)[:5]
    assert [s.loss for s in steps] == pytest.approx(losses, rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > run.attempt.order().spec.optimizer.clip_grad, "clipping was not tried"


@pytest.mark.real_model
def test_a_real_model_equals_a_plain_pytorch_loop(trainer: Trainer) -> None:
    run = trainer.run(
        "real",
        model__partial_pretrain=str(real_model()),
        training__micro_batch_size_per_gpu=4,
        training__use_rmpad=True,
        data__train_batch_size=4,
        data__val_files=[],
        optimizer__lr=5e-5,
        trainer__max_steps=5,
        trainer__save_interval=0,
    )
    shutil.rmtree(run.attempt.order().checkpoint_dir)
    losses, norms, _ = reference(run, 5)
    steps = run.events(StepCompleted)
    assert [s.loss for s in steps] == pytest.approx(losses, rel=1e-4)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-4)


def test_events_come_in_order_and_add_up(base: Run, data: Path) -> None:
    kinds = [type(e) for e in base.all_events()]
    step, validated = [StepCompleted], [ValidationCompleted, SampleGenerated]
    saved = [CheckpointStarted, CheckpointPublished]
    first = [ModelLoaded, DataBound, *validated, WeightsDigested, *step, *step, *validated, *step, *saved]
    assert kinds == [*first, *step, *validated, *step, *step, *validated, *saved]
    bound = base.events(DataBound)[0]
    assert (bound.train_rows, bound.val_rows, bound.planned_steps) == (37, 11, 6)
    loaded = base.events(ModelLoaded)[0]
    assert loaded.parameters == 4 * (64 * 128 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 250 * 64 + 64
    assert loaded.environment["layout"] == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": 1}
    assert loaded.environment["OMP_NUM_THREADS"] == "1"
    steps = base.events(StepCompleted)
    order = SampleOrder(37, seed=1234, shuffle=True)
    lengths = np.array([len(x) for x in pq.read_table(data / "train.parquet")["input_ids"].to_pylist()])
    for n, event in enumerate(steps):
        rows = order.rows(8 * n, 8)
        assert event.samples_digest == samples_digest(rows)
        assert event.tokens_real == lengths[rows].sum() == event.tokens_padded
        assert event.tokens_total == sum(s.tokens for s in steps[: n + 1])
    assert [s.epoch for s in steps] == [0, 0, 0, 0, 0, 1]


def test_validation_and_samples_leave_training_alone(trainer: Trainer, base: Run) -> None:
    quiet = trainer.run("quiet", data__val_files=[], trainer__val_before_train=False)
    assert not quiet.events(ValidationCompleted)
    exact = [(s.loss, s.grad_norm) for s in base.events(StepCompleted)]
    assert [(s.loss, s.grad_norm) for s in quiet.events(StepCompleted)] == exact


def answer_of_transformers(folder: str, text: str) -> tuple[str, int]:
    """The first tokens, at most 8, that the pretrained model of `folder` writes after a text, and their number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    return tokenizer.decode(answer, skip_special_tokens=True), len(answer)


def test_first_answer_is_the_one_of_transformers(base: Run) -> None:
    first = base.events(SampleGenerated)[0]
    assert first.prompt == "abc"
    folder = base.attempt.order().spec.model.partial_pretrain
    assert (first.text, first.tokens) == answer_of_transformers(folder, "<bos>abc!")


def test_prompts_are_rendered_with_the_template_of_the_data(
    trainer: Trainer, data: Path, tmp_path: Path
) -> None:
    table, path = pq.read_table(data / "train.parquet"), tmp_path / "train.parquet"
    chosen = {
        "text": "{{ bos_token }}zz{{ strftime_now('%y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    }
    chosen["date"] = "2013-05-06"
    written = json.dumps({"chat_template": chosen}).encode()
    pq.write_table(table.replace_schema_metadata({b"sftd": written}), path)
    run = trainer.run(
        "template",
        data__train_files=[str(path)],
        trainer__max_steps=1,
        scheduler__warmup_steps=0,
        trainer__sample_prompts=["abc"],
        trainer__sample_max_tokens=8,
    )
    first = run.events(SampleGenerated)[0]
    folder = run.attempt.order().spec.model.partial_pretrain
    assert (first.text, first.tokens) == answer_of_transformers(folder, "<bos>zz13abc")
    assert first.text != answer_of_transformers(folder, "<bos>abc!")[0]


def test_a_loss_that_is_no_number_ends_the_attempt_without_saving(trainer: Trainer) -> None:
    spec = trainer.spec(optimizer__lr=1e30, scheduler__warmup_steps=0, trainer__save_interval=1)
    attempt = trainer.prepare("diverging", spec)
    run = trainer.finish(attempt, trainer.start(attempt), expect=1)
    last = run.events(StepCompleted)[-1]
    assert not (math.isfinite(last.loss) and math.isfinite(last.grad_norm))
    assert [a.what for a in run.events(AnomalyDetected)] == ["non_finite_loss"]
    assert all(c.step < last.step for c in run.events(CheckpointStarted))
    assert "NonFiniteLoss" in run.errors()


def test_a_spike_that_is_skipped_leaves_the_weights_alone(trainer: Trainer) -> None:
    """With such a factor every step is a spike as soon as there are enough losses to judge."""
    spec = trainer.spec(
        2,
        training__on_spike="skip",
        training__spike_factor=1e-4,
        trainer__max_steps=19,
        trainer__val_check_interval=16,
    )
    attempt = trainer.prepare("skipping", spec)
    run = trainer.finish(attempt, trainer.start(attempt))
    anomalies = run.events(AnomalyDetected)
    assert [(a.step, a.what, a.detail["policy"]) for a in anomalies] == [
        (n, "loss_spike", "skip") for n in (17, 18, 19)
    ]
    validations = {v.step: v.loss for v in run.events(ValidationCompleted)}
    assert validations[19] == validations[16] != validations[0]
    assert run.events(CheckpointPublished)[-1].step == 19


def test_what_one_rank_finds_in_the_data_is_told_by_all(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    columns = {"input_ids": [[1, 999]], "attention_mask": [[1, 1]], "labels": [[-100, 5]]}
    pq.write_table(pa.table(columns), path)
    attempt = trainer.prepare("bad_data", trainer.spec(2, data__train_files=[str(path)]))
    run = trainer.finish(attempt, trainer.start(attempt), expect=1)
    assert len(list(run.attempt.ranks_dir.rglob("error.json"))) == 2
    assert "DataError: " in run.errors()
    assert "is outside the model's vocabulary" in run.errors()
    assert not list(run.attempt.rows_dir.iterdir())


def test_data_that_changed_since_submit_is_the_users_error(trainer: Trainer) -> None:
    attempt = trainer.prepare(
        "changed", trainer.spec(trainer__max_steps=None, trainer__epochs=1), planned_steps=99
    )
    run = trainer.finish(attempt, trainer.start(attempt), expect=1)
    assert "UserError" in run.errors()
    assert "have the data files changed?" in run.errors()
    assert not run.events(StepCompleted)
