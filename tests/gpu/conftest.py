"""The trainer's harness on GPUs. Without one every test here is skipped, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.conftest import Trainer, data, models

__all__ = ["data", "models"]


@pytest.fixture(scope="session")
def gpus() -> int:
    """GPUs of this machine; at least 1."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine: nothing of tests/gpu was run")
    return torch.cuda.device_count()


@pytest.fixture(scope="session")
def on_gpu(gpus: int, tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path) -> Trainer:
    """Runs attempts on this machine's GPUs."""
    return Trainer(tmp_path_factory.mktemp("gpu"), models, data, device="cuda", strict=False)


@pytest.fixture(scope="session")
def on_cpu(gpus: int, tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path) -> Trainer:
    """Runs the same attempts on its CPU."""
    return Trainer(tmp_path_factory.mktemp("cpu"), models, data, strict=False)
