"""Resumes of an attempt, and what must match bit for bit."""

from __future__ import annotations

from typing import Any

from sftd.domain.log.events import CheckpointPublished, StepCompleted
from sftd.domain.run.early_stop import Patience
from sftd.wire.checkpoint import manifest as manifests
from tests.builders.trainer.trainers import Run, Trainer
from tests.builders.warm_ranks import WarmTrainer

_NOTHING_WAITED = Patience()


def exact(run: Run) -> dict[int, tuple[Any, ...]]:
    """What must be the same bit for bit."""
    return {
        s.step: (s.loss, s.grad_norm, s.lr, s.epoch, s.tokens, s.tokens_total, s.samples_digest)
        for s in run.events(StepCompleted)
    }


def weights_digests(run: Run, step: int) -> dict[str, str]:
    """sha256 of each data file of a checkpoint: weights, optimizer, random streams. `.metadata` names its own folder."""
    return {
        f.name: f.sha256 for f in manifests.read(run.checkpoint(step), None).files if f.name != ".metadata"
    }


def resume(
    trainer: Trainer,
    warm: WarmTrainer,
    name: str,
    first: Run,
    step: int,
    ranks: int = 1,
    *,
    patience: Patience = _NOTHING_WAITED,
    **overrides: Any,
) -> Run:
    published = next(e for e in first.events(CheckpointPublished) if e.step == step)
    attempt = trainer.prepare(
        name,
        trainer.spec(ranks, **overrides),
        checkpoint=published.path,
        checkpoint_digest=published.manifest_digest,
        checkpoint_dir=first.attempt.order().checkpoint_dir,
        patience=patience,
    )
    return trainer.train(warm, attempt)
