"""The benchmarks and what writes their inputs still run: tiny, on the CPU, in seconds. Their figures mean nothing here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import ModelLoaded, ValidationCompleted
from tests.builders import warm_python as warm
from tests.builders.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.builders.trainer.trainers import Trainer

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(warm_python: str) -> Callable[..., str]:
    """Runs a script, which must end with 0. Returns its output."""

    def run(name: str, *arguments: object) -> str:
        environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        environment |= warm.environment(warm_python, environment)
        argv = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def bench(script: Callable[..., str]) -> Callable[..., tuple[str, list[dict[str, Any]]]]:
    """Runs the benchmark. Returns its output, and its rows."""

    def run(mode: str, *arguments: object) -> tuple[str, list[dict[str, Any]]]:
        shape = "tiny-moe" if mode == "moe" else "tiny"
        fast = ("--shape", shape, "--device", "cpu", "--warmup", 1, "--steps", 3)
        output = script("bench_trainer.py", mode, *arguments, *fast)
        return output, [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    return run


def test_sftd_and_its_peer_are_measured_and_compared_and_a_failure_is_told(
    bench: Callable[..., tuple[str, list[dict[str, Any]]]],
) -> None:
    # Four samples a step, which micro-batches of three do not divide: refused, and the rest is measured.
    arguments = ("--rows", "2,3", "--peer-rows", 2, "--contenders", "sftd,peer-fp32master", "--tokens", 256)
    output, rows = bench("speed", *arguments)
    assert [(row["contender"], row["rows"]) for row in rows] == [
        ("sftd", 2),
        ("peer-fp32master", 2),
        ("sftd", 3),
    ]
    assert "data.train_batch_size" in rows.pop()["failure"]
    for row in rows:
        assert row["tokens_per_step"] == 256
        assert row["tokens_per_second"] > 0
        assert row["last_loss"] < row["first_loss"] < 6.0
    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    assert f"sftd / peer-fp32master: 2 rows {ratio:.2f}, best {ratio:.2f}" in output


def test_packing_is_compared_with_padding_and_profiled(
    bench: Callable[..., tuple[str, list[dict[str, Any]]]],
) -> None:
    output, rows = bench("lengths", "--rows", 4, "--samples", 16, "--profile")
    padded, packed = rows
    assert padded["tokens_per_step"] == packed["tokens_per_step"], "not the same samples"
    assert padded["first_loss"] == pytest.approx(packed["first_loss"], rel=1e-5)
    assert padded["real_share"] < packed["real_share"] <= 1.0
    assert "(the best padded one)" in output
    assert packed["profile"]["groups_ms"]["matmul"] > 0


def test_experts_are_compared_with_their_peer_and_profiled(
    bench: Callable[..., tuple[str, list[dict[str, Any]]]],
) -> None:
    output, rows = bench("moe", "--rows", 8, "--contenders", "sftd,peer-moe")
    assert [(row["contender"], row["tokens_per_step"]) for row in rows] == [("sftd", 512), ("peer-moe", 512)]
    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    assert f"sftd / peer-moe: 8 rows {ratio:.2f}" in output
    assert rows[0]["profile"]["groups_ms"]["matmul"] > 0


def test_random_model_and_data_can_be_trained(
    script: Callable[..., str], trainer: Trainer, tmp_path: Path
) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    script("write_random_model.py", "tiny", model, "--dtype", "float32")
    script("write_random_data.py", data, "--rows", 40, "--vocab", 250, "--length", "lognormal:20:64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    run = trainer.run(
        "random",
        model__partial_pretrain=str(model),
        data__train_files=[str(data / "train.parquet")],
        data__val_files=[str(data / "val.parquet")],
        trainer__max_steps=2,
        trainer__save_interval=0,
    )
    assert run.events(ModelLoaded)[0].parameters == reference.num_parameters()
    assert [v.rows for v in run.events(ValidationCompleted)] == [2, 2]
    assert run.steps()[1].loss == pytest.approx(math.log(250), abs=0.1)


def test_the_cost_of_checkpoints_is_measured(script: Callable[..., str]) -> None:
    output = script("bench_checkpoint.py", "--shape", "tiny", "--device", "cpu", "--steps", 1)
    (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert found["bytes"] > 0
    assert found["load"] > 0
    for saved in found["async"]:
        assert saved["steps"] >= 1
        assert 0 < saved["blocking"] < saved["seconds"]


def test_generation_is_compared_with_transformers(script: Callable[..., str], models: Path) -> None:
    sizes = ("--prompts", 3, "--tokens", 4, "--turns", 1, "--threads", 1)
    lines = script("bench_generate.py", models / "llama_tied", *sizes).splitlines()
    assert lines[-5] == "3 of 3 answers equal those of transformers with its cache"
    found = json.loads(lines[-1])
    assert list(found["median"]) == ["sftd", "transformers, cache", "transformers, no cache"]
