"""Ctrl-C: every command ends at once with 130, says what remains, and leaves no process and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.builders.claims import port_of_our_own
from tests.builders.patience import PATIENCE
from tests.builders.process.homes import Home

# Stops a program where it would import torch; the end of a pipe reports it: no test waits for a time.
HOLD = """
import os, signal, sys
class Still:
    def find_spec(self, name, *_):
        if name == "torch":
            open(os.environ["HELD"], "w").close()
            signal.pause()
sys.meta_path.insert(0, Still())
"""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm_python: str
) -> Iterator[tuple[Home, str]]:
    """A home, and the id of its one run."""
    home = Home(tmp_path_factory.mktemp("trained"), tiny_model, warm_python)
    run_id = home.submit("trainer.max_steps=1", "trainer.val_before_train=false")
    home.drain()
    yield home, run_id
    home.close()


@pytest.fixture
def still(tmp_path: Path) -> Path:
    """Stops tools and trainers before they import torch. Returns a pipe that ends then."""
    folder = tmp_path / "still"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLD)
    os.mkfifo(folder / "held")
    return folder / "held"


@contextmanager
def started(
    home: Home, *arguments: str, argv: list[str] | None = None, still: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command whose whole output can be read from its stdout, in a process group of its own."""
    process = subprocess.Popen(
        argv or home.command(*arguments),
        env=home.env | ({"PYTHONPATH": str(still.parent), "HELD": str(still)} if still else {}),
        cwd=home.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Whatever starts the tests may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE)


def interrupted(process: subprocess.Popen[str], begins: str | Path, *, alone: bool = True) -> str:
    """Send SIGINT, to this process alone or, as a terminal does, to its group, once a line holds that text, or something
    stands still. Returns what is printed afterwards, when the process and its children are gone."""
    assert process.stdout is not None
    if isinstance(begins, Path):
        begins.read_text()
    else:
        assert any(begins in line for line in process.stdout), f"{begins!r} is not printed"
    children = psutil.Process(process.pid).children(recursive=True)
    (os.kill if alone else os.killpg)(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert "Traceback" not in said
    assert "Exception" not in said
    return said


def test_what_waits_says_that_the_run_continues(home: Home) -> None:
    with started(home, "submit", str(home.config), "--wait") as process:
        said = interrupted(process, "No daemon runs here")
    assert process.returncode == 130
    [run_id] = [row["run_id"] for row in json.loads(home.run("ls", "--json").stdout)]
    assert f"interrupted. {run_id} continues: `sftd logs -f {run_id}`" in said
    with started(home, "events", "-f", run_id) as process:
        assert f"interrupted. {run_id} continues." in interrupted(process, "RunSubmitted")
    assert process.returncode == 130
    assert home.show(run_id)["status"] == "queued"


@pytest.mark.parametrize("alone", [True, False])
def test_tools_end_and_leave_nothing(
    trained: tuple[Home, str], still: Path, tmp_path: Path, alone: bool
) -> None:
    home, run_id = trained
    out = tmp_path / "out"
    with started(home, "export", run_id, str(out), still=still) as process:
        said = interrupted(process, still, alone=alone)
    assert process.returncode == 130
    assert f"interrupted. Nothing was written to {out}." in said
    assert not out.exists() or not list(out.iterdir())
    assert not home.events(run_id, "ModelExported")
    with started(home, "generate", run_id, "-p", "hi", still=still) as process:
        said = interrupted(process, still, alone=alone)
    assert process.returncode == 130
    assert "interrupted. Nothing was written." in said


def test_the_pages_of_mlflow_end(home: Home) -> None:
    home.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{home.path}/mlflow.db"
    port = port_of_our_own()
    with started(home, "ui", "--port", str(port)) as process:
        # While it runs, another one says where.
        assert process.stdout is not None
        said = next(line for line in process.stdout if "Ctrl-C" in line)
        assert said == f"MLflow on http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        again = home.run("ui", "--port", str(port)).stdout
        assert again == f"MLflow runs already, on http://127.0.0.1:{port}/\n"
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE)
        assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert (process.returncode, rest) == (0, "stopped\n")
    assert "GET /health" in (home.path / "home/logs/ui.log").read_text()


def test_a_trainer_that_still_imports_says_so_in_a_sentence(home: Home, still: Path) -> None:
    argv = [sys.executable, "-m", "sftd.trainer", str(home.config)]
    with started(home, argv=argv, still=still) as process:
        said = interrupted(process, still)
    assert process.returncode == 130
    assert said == "Stopped before the first step; nothing was written.\n"
