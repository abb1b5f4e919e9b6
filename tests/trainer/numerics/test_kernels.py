"""The GPU's kernels, run by Triton's interpreter on the CPU, against the PyTorch operations that they replace."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.builders.paths import RANKS

SCRIPT = RANKS / "kernels_interpreted.py"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels were not run"
)
def test_kernels_compute_what_pytorch_does() -> None:
    # Triton reads the variable when it is imported.
    environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    blocks = ["norm", "swiglu", "rotary", "cross_entropy", "dropout", "nf4"]
    experts = ["routing", "weighted_swiglu", "grouped_gradient"]
    assert run.stdout.split() == [*blocks, *experts, "lean"]
