"""A save that fails on one rank alone: every rank hears of it, none waits for ever, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sftd.domain.events import AnomalyDetected, CheckpointPublished

if TYPE_CHECKING:
    from tests.trainer.conftest import Trainer  # type: ignore[import-not-found]

pytestmark = pytest.mark.slow

# What rank 0 does by itself at a save's end, between Megatron's collectives, finds the disk full the first time.
SCRIPT = """
import os, sys

if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record
    from sftd.trainer.process import prepare

    prepare()
    from megatron.core.dist_checkpointing import serialization
    from sftd.trainer.loop import run

    save_config, calls = serialization.save_config, []

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1 and os.environ["RANK"] == "0":
            raise OSError(28, "No space left on device")
        return save_config(*args, **kwargs)

    serialization.save_config = fail_once
    record(run)(sys.argv[1])
"""


def test_rank_zero_alone_cannot_write(trainer: Trainer, tmp_path: Path) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text(SCRIPT)
    attempt = trainer.prepare("one-rank-full", trainer.spec(2))
    run = trainer.finish(attempt, trainer.start(attempt, script=script))
    failed = [e for e in run.events(AnomalyDetected) if e.what == "checkpoint_failed"]
    assert [e.step for e in failed] == [3]
    assert "No space left on device" in failed[0].detail["error"]
    assert [e.step for e in run.events(CheckpointPublished)] == [6]
