"""The floors hold, and the linter that says so would notice if they did not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.paths import ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    # In a process of its own: the linter imports the package from the folder that it runs in.
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "", "COLUMNS": "300"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that may be spoilt."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "sftd", tmp_path / "sftd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_floors_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "planted", "contract"),
    [
        ("domain/run/ids.py", "import sftd.store.database.engine", "Floors"),
        ("store/log/runs.py", "import sftd.wire.attempt.journal", "Floors"),
        ("operations/__init__.py", "import sftd.launcher", "Floors"),
        ("launcher/__init__.py", "import sftd.daemon", "Floors"),
        ("cli/__init__.py", "import sftd.trainer.runtime.process", "The control plane imports neither"),
        ("daemon/__init__.py", "def later():\n    import torch", "The control plane imports neither"),
        (
            "trainer/schedule.py",
            "import sftd.store.database.tables",
            "The trainer knows only domain and wire",
        ),
        ("trainer/schedule.py", "import sqlalchemy", "The trainer knows only domain and wire"),
        ("trainer/schedule.py", "import sftd.settings", "The trainer knows only domain and wire"),
        ("domain/run/ids.py", "import pathlib", "The domain is msgspec"),
        ("domain/log/codec.py", "import yaml", "The domain is msgspec"),
        ("wire/attempt/journal.py", "import sqlalchemy", "The wire needs neither"),
        ("settings/__init__.py", "import yaml", "Settings are msgspec"),
        ("domain/log/events/base.py", "import sftd.domain.run.state", "No cycles"),
        ("helpers.py", "", "Floors"),
    ],
)
def test_a_planted_violation_is_caught(copy: Path, file: str, planted: str, contract: str) -> None:
    path = copy / "sftd" / file
    text = path.read_text() if path.exists() else ""
    path.write_text(f"{text}\n{planted}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line or "not listed" in line]
    assert any(contract in line for line in broken) or ("helpers" in done.stdout), done.stdout
