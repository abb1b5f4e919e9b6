"""A few of the kills that scripts/kill_while_saving.py does by the hundred."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.builders.process.kill_while_saving import KillWhileSaving

if TYPE_CHECKING:
    from tests.builders.warm_ranks import WarmTrainer

SEED = 4


@pytest.mark.parametrize(("is_async", "kills"), [(True, 5), (False, 3)])
def test_whatever_a_kill_leaves_is_whole_and_goes_on(
    warm: WarmTrainer, models: Path, data: Path, tmp_path: Path, is_async: bool, kills: int
) -> None:
    trials = KillWhileSaving(warm, tmp_path / "runs", models / "llama_tied", data, SEED, is_async=is_async)
    tally = trials.run(kills)
    assert tally.wrong == []
    assert tally.kills == kills
    assert tally.runs >= 1
    assert tally.verified
