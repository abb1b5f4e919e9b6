"""The trainer's harness on GPUs. Without one every test here is skipped, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.trainer.tiny_models import write_data, write_models
from tests.builders.trainer.trainers import Trainer


@pytest.fixture(scope="session")
def models(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Folder of the tiny models."""
    return made_once("models", write_models)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.parquet and val.parquet."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def gpus() -> int:
    """GPUs of this machine; at least 1."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine: nothing of tests/gpu was run")
    for number in range(torch.cuda.device_count()):
        # Gives the backward thread of each GPU its CUDA context. torch warns when a thread's first operation is a matrix product.
        torch.ones(1, device=f"cuda:{number}", requires_grad=True).exp().backward()
    return torch.cuda.device_count()


@pytest.fixture(scope="session")
def on_gpu(gpus: int, tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path) -> Trainer:
    """Runs attempts on this machine's GPUs."""
    return Trainer(tmp_path_factory.mktemp("gpu"), models, data, device="cuda", strict=False)


@pytest.fixture(scope="session")
def on_cpu(gpus: int, tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path) -> Trainer:
    """Runs the same attempts on its CPU."""
    return Trainer(tmp_path_factory.mktemp("cpu"), models, data, strict=False)
