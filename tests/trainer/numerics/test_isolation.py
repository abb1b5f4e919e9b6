"""A packed sample sees nothing of its neighbours, on any stage of a pipeline and however sequences are shared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.builders.paths import RANKS

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Trainer

SCRIPT = RANKS / "isolation_ranks.py"
# Name → (sizes, model chunks of a rank).
LAYOUTS = {
    "pp2": ({"pipeline_model_parallel_size": 2}, 1),
    "pp2_vpp2": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 2),
    "cp2": ({"context_parallel_size": 2}, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_changed_sample_leaves_its_neighbours_bit_for_bit(trainer: Trainer, name: str) -> None:
    sizes, chunks = LAYOUTS[name]
    layout = {f"model__megatron__{key}": size for key, size in sizes.items()}
    attempt = trainer.prepare(f"isolation_{name}", trainer.spec(2, training__use_rmpad=True, **layout))
    trainer.finish(attempt, trainer.start(attempt, script=SCRIPT))
    for rank in range(2):
        found = json.loads((attempt.path / f"found-{rank}.json").read_text())
        assert found == [{"neighbours_changed": 0, "own_unchanged": 0}] * chunks
