"""Tiny random models, data, and attempts of the real trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders.trainer.tiny_models import PROMPT, write_data, write_models
from tests.builders.trainer.trainers import Run, Trainer
from tests.builders.warm_client import VARIABLE
from tests.builders.warm_ranks import WarmTrainer


@pytest.fixture(scope="session")
def models(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Folder of the tiny models of `MODELS`, in FP32, each with a tokenizer of one token per character."""
    return made_once("models", write_models)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.parquet and val.parquet (whose 11 rows no batch size divides)."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path, warm_python: str) -> Trainer:
    """Runs attempts, and keeps those that have ended for other tests to compare with."""
    return Trainer(tmp_path_factory.mktemp("attempts"), models, data, warm=warm_python)


@pytest.fixture(scope="module")
def forked(warm_python: str) -> Iterator[None]:
    """What a module's tests start without a daemon is forked, unless they clear the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, warm_python)
        yield


@pytest.fixture(scope="session")
def warm(warm_python: str) -> Iterator[WarmTrainer]:
    """Starts ranks without torchrun, in a fraction of its time."""
    process = WarmTrainer(warm_python)
    yield process
    process.close()


@pytest.fixture(scope="session")
def base(trainer: Trainer) -> Run:
    """One rank, micro-batches of one sample, padded, with sample prompts: what the other runs are compared with."""
    return trainer.run("base", trainer__sample_prompts=[PROMPT], trainer__sample_max_tokens=8)
