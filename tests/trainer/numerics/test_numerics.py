"""Numbers of training, validations and answers against `plain.py`: a transformers loop that shares nothing with sftd.

A start of warm ranks trains all attempts of its number of ranks, so that each costs about a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import (
    AnomalyDetected,
    CheckpointPublished,
    DataBound,
    ModelLoaded,
    SampleGenerated,
    StepCompleted,
    TrainingResumed,
)
from sftd.domain.spec.spec import OrderStart
from tests.builders.paths import RANKS
from tests.builders.trainer import plain
from tests.builders.trainer.plain import Plain, Settings, count
from tests.builders.trainer.sample_orders import ORDERS
from tests.builders.trainer.trainers import MEGATRON, Run, Trainer

if TYPE_CHECKING:
    from tests.builders.warm_ranks import WarmTrainer

TRAIN_ATTEMPTS = RANKS / "layouts_ranks.py"
EXPORT = RANKS / "export_all.py"
LONGEST, BATCH, PROMPTS, ANSWER = 20, 4, ("abc", "ddd", "fe", "d"), 7
# Ten of twelve rows are usable, in the order of a list that was recorded with the seed 1234.
ORDER = [row for epoch in ORDERS[1234, 10] for row in epoch]
LR, CLIP = 0.01, 3.0
# Of a few steps in FP32, whose sums have another order.
ROUNDING = 5e-5
# Warm-up of two of six steps, then linear to a quarter; of three steps one is the warm-up.
SIX = [LR * share for share in (0.5, 1.0, 1.0, 0.8125, 0.625, 0.4375)]
THREE = [LR * share for share in (1.0, 1.0, 0.625)]
OPTIMIZER = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 0.01, "clip_grad": CLIP}
OTHERS = {"weight_decay": 0.0, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_eps": 0.1, "clip_grad": 0.4}


def settings(lr: float, optimizer: dict[str, float] = OPTIMIZER) -> Settings:
    """Those of one step."""
    o = optimizer
    return Settings(lr, o["weight_decay"], (o["adam_beta1"], o["adam_beta2"]), o["adam_eps"], o["clip_grad"])


def make_rows(lengths: Sequence[int], seed: int) -> list[plain.Row]:
    """Rows of such lengths; of length 0 are rows that cannot be used. The tokens after a prompt are trained."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, 9, length or 6).tolist()
        ids[-1] = plain.EOS
        prompt = int(rng.integers(0, min(len(ids), LONGEST) - 1))
        labels = [-100] * prompt + ids[prompt:]
        if not length:
            # Nothing is trained, or only the first token, which nothing predicts.
            labels = [-100] * 6 if number % 2 else [ids[0], *[-100] * 5]
        rows.append((ids, labels))
    return rows


def write(path: Path, rows: Sequence[plain.Row], *, weights: bool = False) -> None:
    columns: dict[str, Any] = {
        "input_ids": [ids for ids, _ in rows],
        "labels": [labels for _, labels in rows],
    }
    if weights:
        columns["weight"] = [ROW_WEIGHTS[n % 3] for n in range(len(rows))]
        columns["loss_weights"] = [[token_weight(i) for i in range(len(ids))] for ids, _ in rows]
    pq.write_table(pa.table(columns), path, row_group_size=5)


# The rows of the second slice of the file, of five, have those of the first: 1 in whole slices is another path.
ROW_WEIGHTS = (0.5, 1.0, 3.0)


def token_weight(place: int) -> float:
    return 1.0 if place % 4 else 2.5


def weights_of(number: int, row: plain.Row) -> list[float]:
    """Those of the tokens of a row, by its number in the file."""
    return [ROW_WEIGHTS[number % 3] * token_weight(i) for i in range(len(row[0]))]


TRAIN = make_rows([5, 2, 0, 17, 9, 31, 12, 0, 3, 20, 7, 14], seed=1)
# Two rounds of at most four, the second of three.
VALIDATE = make_rows([11, 2, 20, 0, 33, 5, 4, 13], seed=2)


class Numerics:
    """Attempts of the tiny model and their references."""

    def __init__(self, folder: Path, warm: WarmTrainer) -> None:
        plain.make_model(folder / "model")
        write(folder / "train.parquet", TRAIN)
        write(folder / "val.parquet", VALIDATE)
        write(folder / "weighted.parquet", TRAIN, weights=True)
        self._trainer = Trainer(folder / "attempts", folder, folder)
        self.folder = folder
        self._warm = warm
        self._done: dict[str, dict[str, Run]] = {}
        self._trained: dict[int, Plain] = {0: Plain(folder / "model")}

    def spec(self, ranks: int = 1, **overrides: Any) -> Any:
        """Three steps of four rows; `overrides` as those of `Trainer.spec`."""
        steps = overrides.get("trainer__max_steps", 3)
        if files := overrides.get("data__train_files"):
            overrides |= {"data__train_files": [str(self.folder / name) for name in files]}
        given = {
            "model__partial_pretrain": str(self.folder / "model"),
            "data__sequence_length": LONGEST,
            "data__train_batch_size": BATCH,
            "optimizer__lr": LR,
            "scheduler__type": "linear",
            "scheduler__warmup_steps": steps // 3,
            "scheduler__min_lr_ratio": 0.25,
            "trainer__max_steps": 3,
            "trainer__val_check_interval": 0,
            "trainer__save_interval": 0,
        }
        return self._trainer.spec(
            ranks, **given | {f"optimizer__{k}": v for k, v in OPTIMIZER.items()} | overrides
        )

    def train(
        self,
        name: str,
        ranks: int,
        attempts: dict[str, dict[str, Any]],
        orders: dict[str, dict[str, Any]] | None = None,
    ) -> dict[str, Run]:
        """The runs of some attempts, all with one layout, once per name. `orders`: what theirs say besides the spec."""
        if name not in self._done:
            self._done[name] = {}
            prepared = {
                key: self._trainer.prepare(
                    f"{name}-{key}", self.spec(ranks, **overrides), **(orders or {}).get(key, {})
                )
                for key, overrides in attempts.items()
            }
            self._done[name] = self._trainer.together(prepared, TRAIN_ATTEMPTS, self._warm)
        assert self._done[name], f"the ranks of {name} have failed: see the first test of them"
        return self._done[name]

    def export(self, run: Run, step: int) -> dict[str, Any]:
        """The tensors of a checkpoint by their names in transformers."""
        from safetensors.torch import load_file

        out = run.attempt.path / f"export-{step}"
        out.with_suffix(".json").write_text(
            json.dumps([[str(run.attempt.order_file), str(run.checkpoint(step)), str(out)]])
        )
        outcomes = out.with_suffix(".outcomes")
        started = self._warm.script(
            EXPORT, [str(out.with_suffix(".json")), str(outcomes)], 1, run.attempt.output_log
        )
        self._trainer.ended(run.attempt, started)
        assert json.loads(outcomes.read_text()) == [[0, ""]]
        return dict(load_file(out / "model.safetensors"))

    @cached_property
    def rows(self) -> list[tuple[int, plain.Row]]:
        """The usable training rows with their numbers in the file."""
        return plain.usable(TRAIN, LONGEST)

    def batch(self, step: int) -> list[tuple[int, plain.Row]]:
        """Of 0-based `step`."""
        return self.read(BATCH * step)

    def read(self, position: int) -> list[tuple[int, plain.Row]]:
        """The rows of a step that begins at this place in the order of samples."""
        return [self.rows[i] for i in ORDER[position : position + BATCH]]

    def model(self, steps: int) -> Plain:
        """The reference after some of the six steps."""
        if steps not in self._trained:
            self._trained[steps] = self.model(steps - 1).copy()
            learn(self, self._trained[steps], [steps - 1], SIX)
        return self._trained[steps]

    @cached_property
    def weighted(self) -> Plain:
        """As `three`, with weights."""
        model = self.model(0).copy()
        for step in range(3):
            batch = self.batch(step)
            weights = [weights_of(number, row) for number, row in batch]
            model.step([row for _, row in batch], settings(THREE[step]), weights=weights)
        return model

    @cached_property
    def three(self) -> Plain:
        """The reference after the three steps that the layouts train."""
        return learn(self, self.model(0).copy(), range(3), THREE)


def learn(
    numerics: Numerics,
    model: Plain,
    steps: Sequence[int],
    rates: Sequence[float],
    optimizer: dict[str, float] = OPTIMIZER,
) -> Plain:
    """Train a reference by some steps."""
    for step in steps:
        model.step([row for _, row in numerics.batch(step)], settings(rates[step], optimizer))
    return model


@pytest.fixture(scope="module")
def numerics(tmp_path_factory: pytest.TempPathFactory, warm: WarmTrainer) -> Numerics:
    return Numerics(tmp_path_factory.mktemp("numerics"), warm)


def digest(batch: Sequence[tuple[int, plain.Row]]) -> str:
    """sha256 over the numbers of some rows, little-endian in 8 bytes each."""
    return hashlib.sha256(b"".join(struct.pack("<q", number) for number, _ in batch)).hexdigest()


def assert_as(run: Run, model: Plain, first: int = 0) -> None:
    """Losses and gradient norms of a run are those of a reference from 0-based step `first` on."""
    steps = run.events(StepCompleted)
    assert [s.step for s in steps] == list(range(first + 1, len(model.losses) + 1))
    assert [s.loss for s in steps] == pytest.approx(model.losses[first:], rel=ROUNDING, nan_ok=True)
    assert [s.grad_norm for s in steps] == pytest.approx(model.norms[first:], rel=ROUNDING, nan_ok=True)
    for step, (accuracy, entropy) in zip(steps, model.figures[first:], strict=True):
        if math.isfinite(step.loss):
            assert step.token_accuracy == pytest.approx(accuracy, rel=1e-12)
            assert step.entropy == pytest.approx(entropy, rel=ROUNDING)
        else:
            assert math.isnan(step.entropy)


def assert_validated(run: Run, step: int, model: Plain) -> None:
    """A validation is that of a reference, over every usable row."""
    rows = [row for _, row in plain.usable(VALIDATE, LONGEST)]
    loss, tokens, accuracy, entropy = model.validation(rows)
    found = run.validations()[step]
    assert (found.rows, found.tokens) == (7, tokens)
    assert found.loss == pytest.approx(loss, rel=ROUNDING)
    assert found.token_accuracy == pytest.approx(accuracy, rel=1e-12)
    assert found.entropy == pytest.approx(entropy, rel=ROUNDING)


WEIGHTED = {"data__train_files": ["weighted.parquet"], "data__val_files": []}
PACKED = {"training__use_rmpad": True, "training__micro_batch_tokens": 33}
ALONE: dict[str, dict[str, Any]] = {
    "padded": {
        "trainer__max_steps": 6,
        "trainer__val_check_interval": 2,
        "trainer__save_interval": 2,
        "trainer__sample_prompts": list(PROMPTS),
        "trainer__sample_max_tokens": ANSWER,
        "training__micro_batch_size_per_gpu": 2,
    },
    # Continues from the checkpoint of step 2 of the first.
    "forked": {
        **{f"optimizer__{key}": value for key, value in OTHERS.items()},
        "optimizer__lr": 0.05,
        "trainer__max_steps": 4,
        "scheduler__type": "constant",
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": PACKED,
    "accumulated": {"training__micro_batch_size_per_gpu": 1},
    "unclipped": {"optimizer__clip_grad": 0.0, "data__val_files": []},
    "loosely_clipped": {"optimizer__clip_grad": 50.0, "data__val_files": []},
    "always_clipped": {"optimizer__clip_grad": 0.1, "data__val_files": []},
    "elsewhere": {"data__val_files": []},
    "weighted": WEIGHTED,
}
# Where each step of the last begins to read: as in a fork, and then as after samples that were left out.
POSITIONS = [6, 10, 1]
ELSEWHERE = {"order_start": OrderStart(step=0, sample=6), "order_later": [OrderStart(step=2, sample=1)]}


@pytest.fixture(scope="module")
def alone(numerics: Numerics) -> Callable[[], dict[str, Run]]:
    """The long run of one rank, and its fork."""
    saved = numerics.folder / "attempts/alone-padded/checkpoints/step-00000002"
    return lambda: numerics.train("alone", 1, ALONE, {"forked": {"checkpoint": str(saved)}})


@pytest.fixture(scope="module")
def variants(numerics: Numerics) -> Callable[[], dict[str, Run]]:
    """Short runs of one rank."""
    return lambda: numerics.train("variants", 1, VARIANTS, {"elsewhere": ELSEWHERE})


def test_every_number_of_a_step_is_that_of_a_plain_loop(
    numerics: Numerics, alone: Callable[[], dict[str, Run]]
) -> None:
    """Six steps read from three epochs."""
    model, run = numerics.model(6), alone()["padded"]
    assert_as(run, model)
    assert min(model.norms) < CLIP < max(model.norms), "both sides of clipping are to be tried"
    total = 0
    for step, event in enumerate(run.events(StepCompleted)):
        batch = numerics.batch(step)
        rows = [row for _, row in batch]
        total += sum(map(count, rows))
        lengths = [len(ids) for ids, _ in rows]
        assert event.lr == pytest.approx(SIX[step], rel=1e-12)
        assert (event.tokens, event.tokens_total, event.samples) == (sum(map(count, rows)), total, BATCH)
        assert event.tokens_real == sum(lengths)
        # Micro-batches of two rows, each as long as its longer one.
        assert event.tokens_padded == 2 * max(lengths[:2]) + 2 * max(lengths[2:])
        assert event.samples_digest == digest(batch)
        assert event.mfu is None, "the peak of a CPU is not known"
        # A process that has imported torch.
        assert 2**27 < event.peak_memory_bytes < 2**37
    assert [s.epoch for s in run.events(StepCompleted)] == [0, 0, 0, 1, 1, 2]
    (bound,) = run.events(DataBound)
    assert (bound.train_rows, bound.val_rows, bound.truncated_rows, bound.dropped_rows) == (10, 7, 1, 2)
    assert (bound.steps_per_epoch, bound.planned_steps) == (2.5, 6)


def test_the_weights_after_training_are_those_of_a_plain_loop(
    numerics: Numerics, alone: Callable[[], dict[str, Run]]
) -> None:
    found = numerics.export(alone()["padded"], 6)
    before, after = (numerics.model(n).network.state_dict() for n in (0, 6))
    assert found.keys() == after.keys()
    for name, expected in after.items():
        moved = float((expected - before[name]).abs().max())
        assert moved > LR
        assert float((found[name] - expected).abs().max()) < 1e-4 * moved, name


def test_validations_are_those_of_a_plain_loop(
    numerics: Numerics, alone: Callable[[], dict[str, Run]]
) -> None:
    run = alone()["padded"]
    assert sorted(run.validations()) == [0, 2, 4, 6]
    for step in (0, 2, 4, 6):
        assert_validated(run, step, numerics.model(step))


def test_answers_are_those_of_a_plain_loop(numerics: Numerics, alone: Callable[[], dict[str, Run]]) -> None:
    found = alone()["padded"].events(SampleGenerated)
    assert [(a.step, a.prompt) for a in found] == [(n, prompt) for n in (0, 2, 4, 6) for prompt in PROMPTS]
    expected = [numerics.model(a.step).answer(a.prompt, ANSWER) for a in found]
    assert [(a.text, a.tokens, a.stopped) for a in found] == expected
    assert {stopped for _, _, stopped in expected} == {True, False}, "both ends of an answer are to be tried"


@pytest.mark.parametrize("name", ["packed", "accumulated"])
def test_packing_and_accumulation_are_a_plain_loop(
    numerics: Numerics, variants: Callable[[], dict[str, Run]], name: str
) -> None:
    run = variants()[name]
    assert_as(run, numerics.three)
    assert_validated(run, 0, numerics.model(0))
    assert_validated(run, 3, numerics.three)
    for step, event in enumerate(run.events(StepCompleted)):
        assert event.lr == pytest.approx(THREE[step], rel=1e-12)
        # Without padding: samples end to end, or micro-batches of one.
        assert event.tokens_padded == event.tokens_real == sum(len(r[0]) for _, r in numerics.batch(step))


@pytest.mark.parametrize(
    ("name", "clip"), [("unclipped", 0.0), ("loosely_clipped", 50.0), ("always_clipped", 0.1)]
)
def test_the_gradient_is_clipped_by_its_norm_alone(
    numerics: Numerics, variants: Callable[[], dict[str, Run]], name: str, clip: float
) -> None:
    optimizer = OPTIMIZER | {"clip_grad": clip}
    model = learn(numerics, numerics.model(0).copy(), range(3), THREE, optimizer)
    assert all(norm > clip for norm in model.norms) == (clip < 1.0)
    assert_as(variants()[name], model)


def test_a_fork_trains_with_its_own_settings(numerics: Numerics, alone: Callable[[], dict[str, Run]]) -> None:
    """From the second step on: other moments' decays, epsilon, weight decay, clipping and learning rate."""
    run = alone()["forked"]
    model = numerics.model(2).copy()
    learn(numerics, model, range(2, 4), [0.05] * 4, OTHERS)
    assert_as(run, model, 2)
    # At once, too, with the weights of the checkpoint: its data may be others.
    assert sorted(run.validations()) == [2, 4]
    assert_validated(run, 2, numerics.model(2))
    assert_validated(run, 4, model)
    (resumed,) = run.events(TrainingResumed)
    trained = [sum(count(row) for _, row in numerics.batch(step)) for step in range(4)]
    assert (resumed.step, resumed.tokens_total) == (2, sum(trained[:2]))
    assert [s.tokens_total for s in run.events(StepCompleted)] == [sum(trained[:3]), sum(trained)]


def test_a_run_reads_from_where_its_order_says(
    numerics: Numerics, variants: Callable[[], dict[str, Run]]
) -> None:
    run, model = variants()["elsewhere"], numerics.model(0).copy()
    batches = [numerics.read(position) for position in POSITIONS]
    for batch, rate in zip(batches, THREE, strict=True):
        model.step([row for _, row in batch], settings(rate))
    assert_as(run, model)
    steps = run.events(StepCompleted)
    assert [s.samples_digest for s in steps] == [digest(batch) for batch in batches]
    assert [s.epoch for s in steps] == [0, 1, 0]


def test_weights_weigh_the_loss_and_its_gradient(
    numerics: Numerics, variants: Callable[[], dict[str, Run]]
) -> None:
    run = variants()["weighted"]
    assert_as(run, numerics.weighted)
    # Trained tokens are counted, whatever their weights.
    assert [s.tokens for s in run.events(StepCompleted)] == [
        sum(count(row) for _, row in numerics.batch(step)) for step in range(3)
    ]


CP4 = {MEGATRON + "context_parallel_size": 4}
TP4 = {MEGATRON + "tensor_model_parallel_size": 4}
ASKED = {"trainer__sample_prompts": list(PROMPTS), "trainer__sample_max_tokens": ANSWER}
# Name → (ranks, attempts).
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dp2": (2, {"padded": {}, "packed": PACKED}),
    "cp4": (4, {"padded": CP4, "packed": CP4 | PACKED, "weighted": CP4 | PACKED | WEIGHTED}),
    "tp4": (
        4,
        {
            "padded": TP4 | ASKED,
            "packed": TP4 | ASKED | PACKED | {MEGATRON + "sequence_parallel": True},
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_and_validate_as_a_plain_loop(numerics: Numerics, layout: str) -> None:
    for name, run in numerics.train(layout, *LAYOUTS[layout]).items():
        if name == "weighted":
            assert_as(run, numerics.weighted)
            continue
        assert_as(run, numerics.three)
        assert_validated(run, 0, numerics.model(0))
        assert_validated(run, 3, numerics.three)
        weights = numerics.three.network.parameters()
        assert run.events(ModelLoaded)[0].parameters == sum(p.numel() for p in weights)
        for step, event in enumerate(run.events(StepCompleted)):
            rows = [row for _, row in numerics.batch(step)]
            lengths = [len(ids) for ids, _ in rows]
            assert (event.tokens, event.tokens_real) == (sum(map(count, rows)), sum(lengths))
            if not run.attempt.order().spec.training.use_rmpad:
                # Two chunks of a sequence for each of the ranks that share it.
                multiple = 8 if layout == "cp4" else 1
                assert event.tokens_padded == sum(-(-n // multiple) * multiple for n in lengths)


def test_a_padded_vocabulary_never_answers(numerics: Numerics) -> None:
    """Twelve places for nine tokens on four ranks, of which the last has none."""
    for run in numerics.train("tp4", *LAYOUTS["tp4"]).values():
        found = run.events(SampleGenerated)
        assert len(found) == 2 * len(PROMPTS)
        models = {0: numerics.model(0), 3: numerics.three}
        expected = [models[a.step].answer(a.prompt, ANSWER) for a in found]
        assert [(a.text, a.tokens, a.stopped) for a in found] == expected


TP2 = {MEGATRON + "tensor_model_parallel_size": 2, "data__val_files": []}
POISON, POISONED_ROW = 8, 4


# Of the steps before the first: with every further loss that is learnt from, their median moves.
BEFORE = [1.0] * 8 + [1.5] * 8


def factor(numerics: Numerics, name: str) -> float:
    """On the two sides of the first step's loss; where that is no spike, no step is one."""
    losses = numerics.three.losses
    return (1.001 * max(losses) if name == "below" else 0.999 * losses[0]) / statistics.median(BEFORE)


@pytest.fixture(scope="module")
def judged(numerics: Numerics) -> Callable[[], dict[str, Run]]:
    """Runs of two tensor-parallel ranks."""
    names = ("below", "above")
    attempts = {
        name: TP2 | {"training__on_spike": "skip", "training__spike_factor": factor(numerics, name)}
        for name in names
    }
    # Where only what is no number is left out.
    attempts["recorded"] = TP2 | {
        "training__on_non_finite": "skip",
        "training__spike_factor": factor(numerics, "above"),
    }
    poison_model(numerics)
    attempts["not_finite"] = TP2 | {
        "model__partial_pretrain": str(numerics.folder / "poisoned"),
        "data__train_files": [str(numerics.folder / "poisoned.parquet")],
        "training__on_non_finite": "skip",
    }
    attempts["never"] = TP2 | {
        "training__on_spike": "skip",
        "training__spike_factor": 0.01,
        "trainer__max_steps": 2,
    }
    orders = {name: {"losses": BEFORE} for name in (*names, "never", "recorded")}
    return lambda: numerics.train("judged", 2, attempts, orders)


def poison_model(numerics: Numerics) -> None:
    """A model that has no number for one token, and data in which one row has this token."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(numerics.folder / "model", numerics.folder / "poisoned")
    path = numerics.folder / "poisoned/model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][POISON] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    write(numerics.folder / "poisoned.parquet", poisoned_rows(numerics))


def poisoned_rows(numerics: Numerics) -> list[plain.Row]:
    rows = []
    for number, (ids, labels) in enumerate(TRAIN):
        clean = [3 if i == POISON else i for i in ids]
        if number == numerics.rows[POISONED_ROW][0]:
            clean[0] = POISON
        rows.append((clean, [-100 if x == -100 else i for i, x in zip(clean, labels, strict=True)]))
    return rows


@pytest.mark.parametrize("name", ["below", "above"])
def test_a_spike_is_skipped_on_its_own_side_of_the_threshold(
    numerics: Numerics, judged: Callable[[], dict[str, Run]], name: str
) -> None:
    model, learnt = numerics.model(0).copy(), [*BEFORE]
    skipped = []
    for step in range(3):
        median = statistics.median(learnt)
        most = factor(numerics, name) * median
        model.step([row for _, row in numerics.batch(step)], settings(THREE[step]), most=most)
        if model.losses[-1] > most:
            skipped.append((step + 1, "loss_spike", "skip", median))
        else:
            learnt.append(model.losses[-1])
    assert len(skipped) == (0 if name == "below" else 1)
    run = judged()[name]
    assert_as(run, model)
    found = run.events(AnomalyDetected)
    assert [(a.step, a.what, a.detail["policy"], a.detail["median"]) for a in found] == skipped
    for anomaly in found:
        event = run.steps()[anomaly.step]
        for name in ("loss", "grad_norm", "samples_digest"):
            assert anomaly.detail[name] == getattr(event, name)
    assert run.events(CheckpointPublished)[-1].step == 3


def test_a_spike_that_is_only_recorded_is_learnt_from(
    numerics: Numerics, judged: Callable[[], dict[str, Run]]
) -> None:
    run = judged()["recorded"]
    assert_as(run, numerics.three)
    found = run.events(AnomalyDetected)
    assert [(a.step, a.what, a.detail["policy"]) for a in found] == [(1, "loss_spike", "record")]


def test_a_checkpoint_is_saved_where_every_step_was_skipped(judged: Callable[[], dict[str, Run]]) -> None:
    run = judged()["never"]
    # A loss that nothing was learnt from does not move the median.
    assert [(a.step, a.detail["median"]) for a in run.events(AnomalyDetected)] == [(1, 1.25), (2, 1.25)]
    assert [c.step for c in run.events(CheckpointPublished)] == [2]


def test_a_step_without_a_number_is_skipped_and_the_next_one_is_not(
    numerics: Numerics, judged: Callable[[], dict[str, Run]]
) -> None:
    rows = [row for _, row in plain.usable(poisoned_rows(numerics), LONGEST)]
    model = Plain(numerics.folder / "poisoned")
    for step in range(3):
        model.step([rows[i] for i in ORDER[BATCH * step : BATCH * (step + 1)]], settings(THREE[step]))
    assert [math.isfinite(loss) for loss in model.losses] == [True, False, True]
    run = judged()["not_finite"]
    assert_as(run, model)
    assert [(a.step, a.what, a.detail["policy"]) for a in run.events(AnomalyDetected)] == [
        (2, "non_finite_loss", "skip")
    ]
