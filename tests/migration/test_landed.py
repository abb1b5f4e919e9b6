"""A home that a landed version wrote opens with this one: database, journals, checkpoints, a run and its fork.

`landed/COMMIT.tar.xz` was made by that commit's own code in /tmp/sftd-COMMIT (see landed/README.md); the log has absolute
paths, so a link stands there while the test runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import warm_python
from tests.builders.patience import PATIENCE

LANDED = Path(__file__).with_name("landed")
RUN, FORK = "steady-plover-3615", "fine-osprey-b20b"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The home of 658ac74, under the path that its log names."""
    place = Path("/tmp/sftd-658ac74")
    with tarfile.open(LANDED / "658ac74.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    try:
        place.symlink_to(tmp_path / place.name, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"{place} cannot be a link: {error}")
    yield place
    place.unlink()


def sftd(home: Path, warm: str, *arguments: str, check: int = 0) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SFTD_", "MLFLOW_"))}
    own = {
        "SFTD_HOME": str(home / "home"),
        "MLFLOW_TRACKING_URI": "",
        "SFTD_CPU_SLOTS": "2",
        "COLUMNS": "200",
    }
    own |= warm_python.environment(warm, kept, arguments)
    argv = [sys.executable, "-m", "sftd", *arguments]
    done = subprocess.run(argv, env=kept | own, cwd=home, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == check, f"{arguments} → {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_a_home_of_658ac74_opens_resumes_and_verifies(home: Path, warm_python: str) -> None:
    warm = warm_python
    assert "OK: 2 runs" in sftd(home, warm, "ls") + sftd(home, warm, "db", "check")
    assert {row["run_id"] for row in json.loads(sftd(home, warm, "ls", "--json"))} == {RUN, FORK}
    for run in (RUN, FORK):
        shown = json.loads(sftd(home, warm, "show", run, "--json"))
        assert (shown["status"], shown["step"]) == ("succeeded", 4)
        # Its checkpoints are older than files of weights alone, and stay whole.
        assert "Nothing to delete" in sftd(home, warm, "gc", run)
    assert FORK in sftd(home, warm, "lineage", RUN)
    assert "without recording the model folder" in sftd(
        home, warm, "resume", RUN, "--from-step", "2", "trainer.max_steps=5"
    )
    sftd(home, warm, "daemon", "--drain")
    resumed = json.loads(sftd(home, warm, "show", RUN, "--json"))
    assert (resumed["status"], resumed["step"], resumed["anomalies"]) == ("succeeded", 5, 0)
    assert resumed["steps_redone"] == 2
    assert "verified" in sftd(home, warm, "verify", FORK)
    assert "OK: 2 runs" in sftd(home, warm, "db", "check")
