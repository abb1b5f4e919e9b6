"""The GPU's kernels, run by Triton's interpreter on the CPU, against the PyTorch operations that they replace."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.paths import RANKS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels were not run"
)
BLOCKS = ["norm", "swiglu", "rotary", "cross_entropy", "dropout", "nf4"]
EXPERTS = ["routing", "weighted_swiglu", "expert_bias", "grouped_gradient"]


def output(environment: dict[str, str], *arguments: str) -> list[str]:
    """The words that a script printed."""
    argv = [sys.executable, *arguments]
    run = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the interpreter launched, after its results were compared with PyTorch's."""
    path = tmp_path_factory.mktemp("kernels") / "launches.json"
    # Triton reads the variable when it is imported.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    names = output(environment, str(RANKS / "kernels_interpreted.py"), "cpu", str(path))
    assert names == [*BLOCKS, *EXPERTS, "lean"]
    return path


def test_kernels_compute_what_pytorch_does_and_compile_for_a_gpu(launches: Path) -> None:
    # Not from the cache of another version of the kernels.
    environment = {"TRITON_CACHE_DIR": str(launches.parent / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    compiled = output(environment, str(RANKS / "kernels_compiled.py"), str(launches))
    assert compiled == [launch["name"] for launch in json.loads(launches.read_text())]
    assert len(set(compiled)) >= len(BLOCKS) + len(EXPERTS) + 1
