"""An attempt that the daemon has given up writes nothing more, wherever it lives on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sftd.domain.log.events import AnomalyDetected
from sftd.trainer.errors import GivenUp
from sftd.trainer.runtime.reporter import Reporter
from sftd.wire.attempt.directory import AttemptDir
from tests.builders.patience import until
from tests.builders.warm_ranks import has_ended

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Trainer
    from tests.builders.warm_ranks import WarmTrainer


def test_behind_the_fence_no_line_is_written(tmp_path: Path) -> None:
    attempt = AttemptDir(tmp_path)
    reporter = Reporter(attempt, is_reporter=True)
    other = Reporter(attempt, is_reporter=False)
    event = AnomalyDetected(step=1, what="x")
    reporter.emit(event)
    before = attempt.journal.read_bytes()
    attempt.fence()
    with pytest.raises(GivenUp):
        reporter.emit(event)
    # Any rank may be the one that stages a checkpoint.
    with pytest.raises(GivenUp):
        other.check_fence()
    reporter.close()
    assert attempt.journal.read_bytes() == before
    with pytest.raises(GivenUp):
        Reporter(attempt, is_reporter=True)


SHORT = {"data__val_files": [], "trainer__max_steps": 2, "trainer__save_interval": 1}


def test_behind_the_fence_nothing_is_published(trainer: Trainer, warm: WarmTrainer, tmp_path: Path) -> None:
    """The next attempt may have published this step by then."""
    attempt = trainer.prepare("fenced-late", trainer.spec(**SHORT))
    reached, go = tmp_path / "reached", tmp_path / "go"
    place = {"rank": 0, "path": r"\.partial/manifest\.json$", "reached": str(reached), "go": str(go)}
    ranks = trainer.start_warm(warm, attempt, [("waits_at", place)])
    until(lambda: reached.exists() or all(map(has_ended, ranks.pids)))
    attempt.fence()
    go.touch()
    run = trainer.ended(attempt, ranks, expect=1)
    assert "GivenUp: " in run.output
    assert not run.checkpoint(1).exists()


def test_behind_the_fence_the_next_attempts_files_are_left_alone(trainer: Trainer, warm: WarmTrainer) -> None:
    attempt = trainer.prepare("fenced-early", trainer.spec(**SHORT))
    warm.holds.at(attempt.path, 1, "CheckpointStarted")
    ranks = trainer.start_warm(warm, attempt)
    held = ranks.held(attempt.path)
    others = Path(attempt.order().checkpoint_dir, "step-00000001.partial", "file")
    others.parent.mkdir()
    others.touch()
    attempt.fence()
    before = attempt.journal.read_bytes()
    held.resume()
    run = trainer.ended(attempt, ranks, expect=1)
    assert "GivenUp: " in run.output
    assert others.exists()
    assert attempt.journal.read_bytes() == before
