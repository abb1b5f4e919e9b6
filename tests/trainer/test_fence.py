"""An attempt that the daemon has given up writes nothing more, wherever it lives on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftd.domain.events import AnomalyDetected
from sftd.trainer.errors import GivenUp
from sftd.trainer.reporter import Reporter
from sftd.wire.attempt_dir import AttemptDir


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
