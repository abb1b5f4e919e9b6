"""A few of the faults that scripts/chaos.py injects by the hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.chaos.chaos import Chaos
from tests.builders.chaos.chaos_check import Reference
from tests.builders.chaos.chaos_hosts import postgres
from tests.builders.chaos.chaos_runs import make_reference

pytestmark = pytest.mark.timeout(1800)

SEED = 5


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Reference:
    """One run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return make_reference(folder, tiny_model, variants=1, warm=warm_python)


def test_nothing_comes_of_faults_on_sqlite(reference: Reference, tiny_model: Path, tmp_path: Path) -> None:
    kinds = ["kill a daemon", "kill a rank"]
    with Chaos(tmp_path / "chaos", tiny_model, reference, seed=SEED, runs=1, variants=1) as chaos:
        tally = chaos.run(len(kinds), kinds)
    assert tally.wrong == []
    assert sorted(touch.fault for touch in tally.touches) == sorted(kinds)


def test_nothing_comes_of_faults_on_postgresql(
    reference: Reference, tiny_model: Path, tmp_path: Path
) -> None:
    kinds = ["restart PostgreSQL", "freeze a daemon past its lease"]
    with (
        postgres() as url,
        Chaos(
            tmp_path / "chaos",
            tiny_model,
            reference,
            seed=SEED,
            database_url=url,
            daemons=2,
            runs=1,
            variants=1,
        ) as chaos,
    ):
        tally = chaos.run(len(kinds), kinds)
    assert tally.wrong == []
    assert sorted(touch.fault for touch in tally.touches) == sorted(kinds)
