"""A tiny model, and a home in which the real `sftd` runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.process import slurm_cluster
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a Llama with 2 layers and random weights."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.SlurmCluster]:
    """A real Slurm with two nodes, one for all tests. Skips where there can be none."""
    if reason := slurm_cluster.why_not():
        pytest.skip(f"no real Slurm: {reason}")
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster: slurm_cluster.SlurmCluster) -> slurm_cluster.SlurmCluster:
    """That Slurm with both nodes idle, whatever the test before has left."""
    cluster.restore()
    return cluster


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, warm_python: str) -> Iterator[Home]:
    """A fresh home. Whatever still runs in it at the end is killed."""
    home = Home(tmp_path, tiny_model, warm_python)
    yield home
    home.close()


@pytest.fixture
def cold_home(tmp_path: Path, tiny_model: Path) -> Iterator[Home]:
    """A fresh home whose attempts import everything by themselves, as a user's do."""
    home = Home(tmp_path, tiny_model)
    yield home
    home.close()
