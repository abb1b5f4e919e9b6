"""A tiny model, and a home in which the real `sftd` runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.process import slurm_cluster
from tests.process.harness import SHAPE, VOCABULARY, Home


def write_tiny_model(folder: Path) -> Path:
    """Write the Hugging Face folder of a Llama with 2 layers and random weights. Returns it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    hidden, ffn, kv = 64, 128, 32
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
