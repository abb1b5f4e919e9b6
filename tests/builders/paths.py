"""Where the checkout is, what tests compare with, and the programs that ranks run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/unit/golden"
RANKS = Path(__file__).parent / "ranks"
