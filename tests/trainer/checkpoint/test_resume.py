"""Resuming: bit for bit as if nothing had happened, from whole checkpoints only, and saving when the disk is full."""

from __future__ import annotations

import pickle
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from sftd.domain.log.events import (
    AnomalyDetected,
    CheckpointPublished,
    CheckpointRejected,
    CheckpointStarted,
    StepCompleted,
    StoppedEarly,
    TrainingResumed,
    ValidationCompleted,
)
from sftd.domain.run.early_stop import patience
from sftd.domain.spec.sections import EarlyStop
from tests.builders.holds import is_pending
from tests.builders.patience import PATIENCE, until
from tests.builders.trainer.checkpoint_files import Payload
from tests.builders.trainer.resumes import exact, resume, weights_digests

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer


def test_after_a_kill_one_rank_goes_on_bit_for_bit(trainer: Trainer, base: Run) -> None:
    """The run of `base`, killed after its checkpoint of step 3. Step 6, which is redone, crosses an epoch's end."""
    spec = base.attempt.order().spec
    attempt = trainer.prepare("killed", spec)
    trainer.holds.at(attempt.path, 4)
    process = trainer.start(attempt, cold=True)
    trainer.held(attempt, process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    killed = trainer.finish(attempt, process, expect=-signal.SIGKILL)
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1], "ranks outlived torchrun"

    published = killed.events(CheckpointPublished)[-1]
    again = trainer.prepare(
        "killed-2", spec, checkpoint=str(killed.checkpoint(3)), checkpoint_digest=published.manifest_digest
    )
    resumed = trainer.finish(again, trainer.start(again))
    event = resumed.events(TrainingResumed)[0]
    assert (event.step, event.tokens_total) == (3, base.steps()[3].tokens_total)
    assert exact(resumed) == {step: numbers for step, numbers in exact(base).items() if step > 3}
    assert not [v for v in resumed.events(ValidationCompleted) if v.step == 0]
    assert weights_digests(resumed, 6) == weights_digests(base, 6)


def test_after_a_stop_two_ranks_go_on_bit_for_bit(trainer: Trainer, warm: WarmTrainer) -> None:
    whole = trainer.train(warm, trainer.prepare("dp2_whole", trainer.spec(2, trainer__save_interval=0)))
    attempt = trainer.prepare("dp2_stopped", whole.attempt.order().spec)
    warm.holds.at(attempt.path, 1)
    ranks = trainer.start_warm(warm, attempt)
    held = ranks.held(attempt.path)
    attempt.request_stop()
    held.resume()
    stopped = trainer.ended(attempt, ranks)
    step = stopped.events(StepCompleted)[-1].step
    assert step == 2
    assert [c.step for c in stopped.events(CheckpointPublished)] == [step]
    resumed = resume(trainer, warm, "dp2_stopped-2", stopped, step, 2, trainer__save_interval=0)
    assert exact(stopped) | exact(resumed) == exact(whole)
    assert weights_digests(resumed, 6) == weights_digests(whole, 6)


def test_an_early_stop_is_at_the_same_step_after_a_resume(trainer: Trainer, warm: WarmTrainer) -> None:
    # Nothing is better than step 0, so that patience runs out at step 4.
    rule = EarlyStop(metric="val_loss", mode="max", patience=2, min_delta=99)
    overrides = {"trainer__early_stop": msgspec.to_builtins(rule)}
    whole = trainer.train(warm, trainer.prepare("early", trainer.spec(2, **overrides)))
    (stopped,) = whole.events(StoppedEarly)
    values = [(v.step, v.loss) for v in whole.events(ValidationCompleted)]
    assert (stopped.step, stopped.best_step, stopped.best) == (4, *values[0])
    assert [c.step for c in whole.events(CheckpointPublished)] == [3, 4]
    assert list(exact(whole)) == [1, 2, 3, 4]
    digests = weights_digests(whole, 4)
    resumed = resume(
        trainer, warm, "early_resumed", whole, 3, 2, patience=patience(rule, values[:2]), **overrides
    )
    assert (resumed.events(StoppedEarly), weights_digests(resumed, 4)) == ([stopped], digests)
    assert exact(resumed) == {4: exact(whole)[4]}


def test_ranks_that_share_sequences_go_on_bit_for_bit(trainer: Trainer, warm: WarmTrainer) -> None:
    layout = {"model__megatron__context_parallel_size": 2, "training__use_rmpad": True, "data__val_files": []}
    whole = trainer.train(warm, trainer.prepare("cp2_whole", trainer.spec(2, **layout)))
    resumed = resume(trainer, warm, "cp2_resumed", whole, 3, 2, **layout)
    assert exact(resumed) == {step: numbers for step, numbers in exact(whole).items() if step > 3}
    assert weights_digests(resumed, 6) == weights_digests(whole, 6)


def test_a_stop_waits_for_the_save_that_is_in_flight(trainer: Trainer, warm: WarmTrainer) -> None:
    spec = trainer.spec(
        data__val_files=[], trainer__max_steps=60, trainer__save_interval=1, checkpoint__async_save=True
    )
    attempt = trainer.prepare("stopped_while_saving", spec)
    warm.holds.at(attempt.path, 3, "CheckpointStarted")
    ranks = trainer.start_warm(warm, attempt)
    held = ranks.held(attempt.path)
    attempt.request_stop()
    held.resume()
    run = trainer.ended(attempt, ranks)
    steps = [s.step for s in run.events(StepCompleted)]
    assert len(steps) < 60
    assert [c.step for c in run.events(CheckpointStarted)] == steps
    assert [c.step for c in run.events(CheckpointPublished)] == steps


def test_sigterm_saves_a_checkpoint_at_the_step_boundary(trainer: Trainer) -> None:
    attempt = trainer.prepare("terminated", trainer.spec(trainer__save_interval=0, data__val_files=[]))
    trainer.holds.at(attempt.path, 1)
    process = trainer.start(attempt)
    rank = trainer.held(attempt, process)
    process.send_signal(signal.SIGTERM)
    until(lambda: is_pending(rank, signal.SIGTERM), "torchrun does not pass it on")
    rank.resume()
    # torchrun itself ends with 1 after a signal, however well its ranks ended.
    run = trainer.finish(attempt, process, expect=None)
    assert run.events(StepCompleted)[-1].step == 2
    assert [c.step for c in run.events(CheckpointPublished)] == [2]
    assert not run.errors()


def test_a_redone_step_keeps_the_published_checkpoint(trainer: Trainer, warm: WarmTrainer, base: Run) -> None:
    before = base.events(CheckpointPublished)[-1]
    spec = base.attempt.order().spec
    attempt = trainer.prepare(
        "redone", spec, checkpoint=str(base.checkpoint(3)), checkpoint_dir=str(base.checkpoint(3).parent)
    )
    run = trainer.train(warm, attempt)
    after = run.events(CheckpointPublished)[-1]
    assert (after.path, after.bytes, after.manifest_digest) == (
        before.path,
        before.bytes,
        before.manifest_digest,
    )


def test_a_tampered_checkpoint_is_rejected_before_it_is_unpickled(
    trainer: Trainer, warm: WarmTrainer, base: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "step-00000003"
    shutil.copytree(base.checkpoint(3), folder)
    proof = tmp_path / "unpickled"
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(proof)))
    attempt = trainer.prepare("tampered", base.attempt.order().spec, checkpoint=str(folder))
    run = trainer.train(warm, attempt, expect=1)
    rejected = run.events(CheckpointRejected)
    assert [(e.step, e.path) for e in rejected] == [(3, str(folder))]
    assert ".metadata" in rejected[0].reason
    assert not run.events(StepCompleted)
    assert not proof.exists()
    assert "CheckpointInvalid" in run.output


def test_a_full_disk_costs_a_checkpoint_but_not_the_training(trainer: Trainer) -> None:
    """A limit on the size of files stands in for the full disk: the data files do not fit, the journal does."""
    attempt = trainer.prepare("full_disk", trainer.spec(data__val_files=[]))
    run = trainer.finish(attempt, trainer.start(attempt, largest_file=300_000), expect=1)
    assert [s.step for s in run.events(StepCompleted)] == [1, 2, 3, 4, 5, 6]
    assert [(a.step, a.what) for a in run.events(AnomalyDetected)] == [
        (3, "checkpoint_failed"),
        (6, "checkpoint_failed"),
    ]
    assert "bytes free" in run.events(AnomalyDetected)[0].detail["error"]
    assert not run.events(CheckpointPublished)
    assert list(run.checkpoint(3).parent.iterdir()) == []
    assert "CheckpointSaveFailed" in run.errors()
