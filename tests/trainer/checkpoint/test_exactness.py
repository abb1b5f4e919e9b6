"""Killed and resumed, again and again: bit for bit the run that nobody disturbed, in every layout; and, to rounding, the
same across layouts. One warm process forks the ranks of all attempts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import CheckpointPublished, StepCompleted, TrainingResumed
from sftd.launcher.tools import run_tool
from sftd.wire.checkpoint import manifest as manifests
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    from pathlib import Path

    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

SEED = 4
STEPS = 10
# Rows are 37, a batch is 8: the fifth step takes the first epoch's last rows and the second's first.
EPOCH_ENDS = 5
TP2 = {MEGATRON + "tensor_model_parallel_size": 2}
PP2 = {
    MEGATRON + "pipeline_model_parallel_size": 2,
    MEGATRON + "virtual_pipeline_model_parallel_size": 2,
}
# Two sources, whose files `Exactness` fills in. The first is read to its end before the second stage, the second again and again.
SOURCES = [
    {"name": "long", "weight": 3, "max_rows": 20, "on_exhausted": "stop"},
    {"name": "short", "weight": 1},
]
MIXED = {
    "data__train_files": [],
    "data__sources": SOURCES,
    "data__weights_by": "tokens",
    "data__stages": [{"until_step": 2, "weights": {"long": 1}}],
}
LORA = {"model__lora__rank": 4, "model__lora__dropout": 0.1, "optimizer__lr": 1e-2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "pp2_vpp2": (2, PP2),
    "lean": (2, MIXED | {"optimizer__precision": "lean"}),
    "lora": (2, MIXED | TP2 | LORA),
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {"lora_pp2_vpp2": (2, MIXED | PP2 | LORA)}
PLAN = {
    "trainer__max_steps": STEPS,
    "trainer__save_interval": 2,
    "training__micro_batch_size_per_gpu": 2,
    "data__val_files": [],
}


class Exactness:
    """Attempts of the tiny Llama in the warm process."""

    def __init__(self, trainer: Trainer, warm: WarmTrainer, data: Path) -> None:
        self._trainer = trainer
        self._data = data
        self._warm = warm
        self._whole: dict[str, Run] = {}

    def whole(self, layout: str) -> Run:
        """The run that nobody disturbs, which saves while training waits."""
        if layout not in self._whole:
            self._whole[layout] = self.run(f"{layout}-whole", layout)
        return self._whole[layout]

    def run(
        self,
        name: str,
        layout: str,
        resumed: Run | None = None,
        *,
        step: int | None = None,
        kill_at: int | None = None,
        kind: str = "StepCompleted",
        **overrides: Any,
    ) -> Run:
        """One attempt, from the newest checkpoint of `resumed` or that of `step`; killed after the journal's line of a `kind` of
        a step."""
        ranks, sizes = (LAYOUTS | OTHERS)[layout]
        order = {}
        if resumed is not None:
            order = newest(resumed, step)
            if step is None:
                order["checkpoint_dir"] = resumed.attempt.order().checkpoint_dir
        options = PLAN | sizes | overrides
        if "data__sources" in options:
            files = (self._data / f"{file}.parquet" for file in ("train", "val"))
            of_files = zip(SOURCES, files, strict=True)
            options["data__sources"] = [{**source, "files": [str(file)]} for source, file in of_files]
        attempt = self._trainer.prepare(name, self._trainer.spec(ranks, **options), **order)
        if kill_at is not None:
            self._warm.holds.at(attempt.path, kill_at, kind)
        started = self._warm.attempt(attempt.path, ranks, attempt.output_log)
        if kill_at is not None:
            started.held(attempt.path)
            started.kill()
        return self._trainer.ended(attempt, started, expect=0 if kill_at is None else -9)


def newest(run: Run, step: int | None) -> dict[str, Any]:
    """What an order says of the checkpoint to continue from."""
    found = [p for p in run.events(CheckpointPublished) if step is None or p.step == step]
    if not found:
        before = run.attempt.order()
        return {"checkpoint": before.checkpoint, "checkpoint_digest": before.checkpoint_digest}
    return {"checkpoint": found[-1].path, "checkpoint_digest": found[-1].manifest_digest}


def exact(run: Run) -> dict[int, tuple[Any, ...]]:
    """What must be the same bit for bit."""
    return {
        s.step: (s.loss.hex(), s.grad_norm.hex(), s.lr, s.epoch, s.tokens_total, s.samples_digest, s.sources)
        for s in run.events(StepCompleted)
    }


def contents(run: Run) -> dict[str, str]:
    """sha256 of each file of the last checkpoint: weights, optimizer, random streams. `.metadata` names its own folder."""
    files = manifests.read(run.checkpoint(STEPS), None).files
    return {f.name: f.sha256 for f in files if f.name != ".metadata"}


@pytest.fixture(scope="module")
def attempts(trainer: Trainer, warm: WarmTrainer, data: Path) -> Exactness:
    return Exactness(trainer, warm, data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_anywhere_it_goes_on_bit_for_bit(attempts: Exactness, layout: str) -> None:
    """At a random step, at an epoch's end, and where a checkpoint begins to be saved while training continues."""
    whole = attempts.whole(layout)
    numbers = random.Random(f"{SEED} {layout}")
    somewhere = numbers.randint(1, EPOCH_ENDS - 1)
    kills = [(somewhere, "StepCompleted"), (EPOCH_ENDS, "StepCompleted"), (6, "CheckpointStarted")]
    run, seen = None, {}
    for number, (kill_at, kind) in enumerate([*kills, (None, "")]):
        name = f"{layout}-{number}"
        run = attempts.run(name, layout, run, kill_at=kill_at, kind=kind, checkpoint__async_save=True)
        steps = exact(run)
        assert steps == {step: numbers for step, numbers in exact(whole).items() if step in steps}
        seen |= steps
    assert seen == exact(whole)
    assert run is not None
    assert contents(run) == contents(whole)


@pytest.mark.parametrize("chain", [("one", "tp2", "pp2_vpp2"), ("dp2", "one"), ("lora", "lora_pp2_vpp2")])
def test_another_layout_goes_on_within_rounding(attempts: Exactness, chain: tuple[str, ...]) -> None:
    run = first = attempts.whole(chain[0])
    for number, layout in enumerate(chain[1:], 1):
        run = attempts.run(f"{chain[0]}-to-{layout}", layout, run, step=4 * number)
        assert run.events(TrainingResumed)[0].step == 4 * number
    for step, event in run.steps().items():
        assert event.loss == pytest.approx(first.steps()[step].loss, rel=1e-5)
        assert event.samples_digest == first.steps()[step].samples_digest


def test_a_mixture_reads_the_same_rows_in_every_layout(attempts: Exactness) -> None:
    """Two copies of the model, each with half of a step's rows, and two ranks that share them: the rows that the files, the
    weights and the stages give, and the figures of each source."""
    whole, other = attempts.whole("lean"), attempts.whole("lora")
    at = [str(step * 8) for step in range(STEPS)]
    seen = run_tool("seen_rows", [str(whole.attempt.order_file), "--at", *at], lambda _: None)["seen"]
    for step, found in enumerate(seen, 1):
        by_source = {
            name: (
                len(rows := [row for row in found["rows"] if row["source"] == name]),
                sum(r["trained"] for r in rows),
            )
            for name in ("long", "short")
        }
        for event in (whole.steps()[step], other.steps()[step]):
            assert event.samples_digest == found["samples_digest"]
            assert event.sources is not None
            counts = {name: (of.rows, of.tokens) for name, of in event.sources.items()}
            assert counts == {name: count for name, count in by_source.items() if count[0]}
            losses = sum(of.loss * of.tokens for of in event.sources.values())
            assert event.loss == pytest.approx(losses / event.tokens, rel=1e-6)
    # The second stage gives the first source more of the rows; once all of it is read, it gives none.
    first, second, last = ([row["source"] for row in seen[n]["rows"]].count("long") for n in (1, 2, -1))
    assert 0 < first < second
    assert last == 0
    rows = [row["row"] for found in seen for row in found["rows"] if row["source"] == "long"]
    assert len(set(rows)) == len(rows) == 20
