"""Adapters: one that peft has written, and runs beside peft's training and beside each other."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq

from tests.builders.trainer.plain import Plain, Settings, usable
from tests.builders.trainer.trainers import Run, Trainer


def write_adapter(model: Path, folder: Path, alpha: int) -> Path:
    """A PEFT folder with random A and B of rank 4 for all products of a layer; of a model with experts only for those of attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch

        torch.manual_seed(5)
        network = Plain(model).network
        # peft's all-linear adapts the router too.
        has_experts = any("experts" in name for name, _ in network.named_modules())
        targets = [f"{p}_proj" for p in "qkvo"] if has_experts else "all-linear"
        config = peft.LoraConfig(
            r=4,
            lora_alpha=alpha,
            target_modules=targets,
            # Of a gated delta net sftd adapts the last product.
            exclude_modules=r".*\.in_proj_\w+",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        peft.get_peft_model(network, config).save_pretrained(folder)
    return folder


def assert_trains_like(run: Run, plain: Plain) -> None:
    """Every step of a run without shuffle has the loss and the gradient norm of transformers with peft, to 1e-4."""
    spec = run.attempt.order().spec
    o, size = spec.optimizer, spec.data.train_batch_size
    table = pq.read_table(spec.data.train_files[0]).to_pydict()
    rows = [row for _, row in usable(zip(table["input_ids"], table["labels"], strict=True), 64)]
    for step, event in run.steps().items():
        settings = Settings(event.lr, o.weight_decay, (o.adam_beta1, o.adam_beta2), o.adam_eps, o.clip_grad)
        # The file may have fewer rows than the steps: a batch is filled from the next epoch.
        plain.step([rows[i % len(rows)] for i in range(size * (step - 1), size * step)], settings)
        assert math.isclose(event.loss, plain.losses[-1], rel_tol=1e-4), (step, event.loss, plain.losses[-1])
        assert math.isclose(event.grad_norm, plain.norms[-1], rel_tol=1e-4), (
            step,
            event.grad_norm,
            plain.norms[-1],
        )
    assert len(plain.losses) == spec.trainer.max_steps


def assert_same_steps(run: Run, expected: Run) -> None:
    """Losses agree to 1e-5 and gradient norms to 1e-4."""
    assert run.steps().keys() == expected.steps().keys()
    for step, event in expected.steps().items():
        other = run.steps()[step]
        assert math.isclose(event.loss, other.loss, rel_tol=1e-5), (step, event.loss, other.loss)
        assert math.isclose(event.grad_norm, other.grad_norm, rel_tol=1e-4), (step, event.grad_norm)


def export(trainer: Trainer, run: Run, step: int, folder: Path, *options: str) -> Path:
    """Write a checkpoint of a run as a PEFT folder, or with `--merge` the whole model."""
    argv = [sys.executable, "-m", "sftd.trainer.tools.export", str(run.attempt.order_file)]
    argv += [str(run.checkpoint(step)), str(folder), *options]
    subprocess.run(argv, env=trainer.environment(), check=True, stdout=subprocess.PIPE)
    return folder
