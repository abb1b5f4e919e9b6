"""The planted defects of tests/planted/ still apply: a change that moves code moves its defects along."""

from __future__ import annotations

import subprocess
import sys

from tests.builders.paths import ROOT


def test_every_planted_defect_applies_and_its_tests_exist() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/planted.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout
