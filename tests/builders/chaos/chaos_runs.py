"""The runs that tests/builders/chaos/chaos.py disturbs, and how they go when nobody does."""

from __future__ import annotations

from pathlib import Path

from sftd.store.database.engine import Store, open_engine
from tests.builders.chaos import chaos_check
from tests.builders.chaos.chaos_check import Reference
from tests.builders.process.homes import Home

# What of each run is computed otherwise than of the others, so that one run's numbers never pass for another's.
VARIANTS = (
    ("model.megatron.seed=1",),
    ("model.megatron.seed=2", "checkpoint.async_save=true"),
    ("model.megatron.seed=3", "optimizer.lr=5e-4"),
)
STEPS, INTERVAL = 300, 50
RUN = (
    f"trainer.max_steps={STEPS}",
    f"trainer.save_interval={INTERVAL}",
    # Faults come faster here than progress does.
    "launch.max_restarts=1000000",
    "launch.hang_seconds=5",
)


def make_reference(
    folder: Path, model: Path, variants: int = len(VARIANTS), warm: str | None = None
) -> Reference:
    """Train each variant once, undisturbed."""
    folder.mkdir(parents=True)
    home = Home(folder, model, warm)
    home.env["SFTD_CPU_SLOTS"] = "2"
    # A daemon that is slow for a moment keeps its lease.
    runs = [home.submit(*RUN, "launch.hang_seconds=1800", *variant) for variant in VARIANTS[:variants]]
    home.drain()
    engine = open_engine(f"sqlite:///{folder}/home/sftd.db")
    try:
        return chaos_check.read_reference(Store(engine), runs)
    finally:
        engine.dispose()
