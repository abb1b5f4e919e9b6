"""What may change while a run stays the same run, and where a fork begins to read."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sftd.domain.run import trajectory
from sftd.domain.run.state import Run
from sftd.domain.spec.learning_rate import learning_rate
from sftd.domain.spec.parse import LEAVES, change, parse
from sftd.domain.spec.spec import OrderStart, Spec

CONFIG = {
    "model": {"partial_pretrain": "/m"},
    "data": {"train_files": ["/t"], "train_batch_size": 64},
    "trainer": {"max_steps": 100},
}


def spec(**overrides: Any) -> Spec:
    return parse(CONFIG, [(key.replace("__", "."), value) for key, value in overrides.items()])[0]


def guilty(old: Spec, new: Spec, steps: int = 50) -> list[str]:
    planned = [s.trainer.max_steps or 100 for s in (old, new)]
    return trajectory.other_trajectory(old, new, steps=steps, old_planned=planned[0], new_planned=planned[1])


@pytest.mark.parametrize(
    ("old", "new", "anomalies", "expected"),
    [
        ({"on_spike": "record"}, {"on_spike": "skip"}, 1, ["training.on_spike"]),
        ({"on_spike": "record"}, {"on_spike": "skip"}, 0, []),
        ({"on_spike": "skip"}, {"on_spike": "stop"}, 1, ["training.on_spike"]),
        ({"on_spike": "stop"}, {"on_spike": "skip"}, 1, []),
        ({"on_spike": "record"}, {"on_spike": "rollback"}, 1, []),
        ({"on_non_finite": "stop"}, {"on_non_finite": "skip"}, 1, []),
        ({"on_non_finite": "skip"}, {"on_non_finite": "stop"}, 1, ["training.on_non_finite"]),
        ({}, {"spike_factor": 2.0}, 1, []),
        ({"on_spike": "skip"}, {"on_spike": "skip", "spike_factor": 2.0}, 0, ["training.spike_factor"]),
    ],
)
def test_a_policy_that_would_have_skipped_other_steps_is_another_trajectory(
    old: dict[str, Any], new: dict[str, Any], anomalies: int, expected: list[str]
) -> None:
    specs = [spec(**{f"training__{key}": value for key, value in one.items()}) for one in (old, new)]
    found = trajectory.other_trajectory(
        *specs, steps=50, old_planned=100, new_planned=100, anomalies=anomalies
    )
    assert found == expected


FREE = {
    "evaluation": [{"kind": "command", "name": "c", "argv": ["x"]}],
    "checkpoint.after_success": "all",
    "checkpoint.async_save": True,
    "checkpoint.keep_best": 3,
    "checkpoint.keep_every": 5,
    "checkpoint.keep_last": 5,
    "checkpoint.save_dir": "/elsewhere",
    "launch.device": "cuda",
    "launch.hang_factor": 3.0,
    "launch.hang_seconds": 7,
    "launch.launcher": "slurm",
    "launch.max_restarts": 9,
    "launch.min_progress_steps": 7,
    "launch.nnodes": 2,
    "launch.nproc_per_node": 8,
    "launch.preemptible": True,
    "launch.priority": 3,
    "launch.slurm.account": "a",
    "launch.slurm.constraint": "a",
    "launch.slurm.exclude": "n1",
    "launch.slurm.extra_args": ["--mem=0"],
    "launch.slurm.gres": "gpu:8",
    "launch.slurm.partition": "p",
    "launch.slurm.qos": "q",
    "launch.slurm.setup": "module load",
    "launch.slurm.stop_seconds": 60,
    "launch.slurm.time": "90",
    "launch.threads_per_rank": 2,
    "model.enable_gradient_checkpointing": True,
    "model.megatron.context_parallel_size": 2,
    "model.megatron.expert_model_parallel_size": 2,
    "model.megatron.pipeline_model_parallel_size": 2,
    "model.megatron.sequence_parallel": True,
    "model.megatron.tensor_model_parallel_size": 2,
    "model.megatron.virtual_pipeline_model_parallel_size": 2,
    "model.recompute": "selective",
    "model.recompute_layers": 2,
    "trainer.early_stop": {"metric": "val_loss", "mode": "min", "patience": 2},
    "trainer.sample_max_tokens": 7,
    "trainer.sample_prompts": ["Why?"],
    "trainer.save_interval": 7,
    "trainer.val_before_train": False,
    "trainer.val_check_interval": 7,
    # What they skip is looked at besides: see the first test.
    "training.on_non_finite": "rollback",
    "training.on_spike": "rollback",
    "training.spike_factor": 2.0,
    "training.deterministic": True,
    "training.micro_batch_size_per_gpu": 2,
    "training.micro_batch_tokens": 4096,
    "training.use_rmpad": True,
}
NOT_FREE = {
    "data.sequence_length": 64,
    "data.shuffle": False,
    "data.sources": [{"name": "code", "files": ["/c"]}],
    "data.stages": [{"until_step": 2, "weights": {"code": 1.0}}],
    "data.weights_by": "tokens",
    "data.train_batch_size": 128,
    "data.train_files": ["/other"],
    "data.truncation": "left",
    "data.val_files": ["/v"],
    "model.freeze": ["^model.norm"],
    "model.freeze_router": True,
    "model.lora.adapter": "/adapter",
    "model.lora.alpha": 8.0,
    "model.lora.dropout": 0.5,
    "model.lora.init": "gaussian",
    "model.lora.rank": 8,
    "model.lora.rslora": True,
    "model.lora.targets": ["q"],
    "model.megatron.params_dtype": "float32",
    "model.moe.load_balancing_loss": 0.5,
    "model.moe.z_loss": 0.5,
    "model.megatron.seed": 1,
    "model.megatron.use_distributed_optimizer": False,
    "model.name": "megatron-sft",
    "model.override_config": {"rope_theta": 5.0},
    "model.partial_pretrain": "/other",
    "model.quantize": "nf4",
    "model.trust_remote_code": True,
    "optimizer.adam_beta1": 0.5,
    "optimizer.adam_beta2": 0.5,
    "optimizer.adam_eps": 0.5,
    "optimizer.clip_grad": 3.0,
    "optimizer.lr": 1.0,
    "optimizer.precision": "lean",
    "optimizer.weight_decay": 0.5,
    "scheduler.decay_ratio": 0.5,
    "scheduler.min_lr_ratio": 0.5,
    "scheduler.type": "linear",
    "scheduler.warmup_ratio": 0.5,
    "scheduler.warmup_steps": 5,
    "trainer.experiment_name": "other",
    "trainer.project_name": "other",
}


def test_every_key_is_listed_here() -> None:
    """A new key is `fixed`. One that is to be free says so in its field, and here."""
    marks = {key: trajectory.on_resume(key) for key in LEAVES}
    assert {key for key, mark in marks.items() if mark == "length"} == {"trainer.max_steps", "trainer.epochs"}
    # It follows from the others, so it is never a change of its own.
    derived = {"training.gradient_accumulation_steps"}
    assert {key for key, mark in marks.items() if mark == "free"} == FREE.keys() | derived
    assert {key for key, mark in marks.items() if mark == "fixed"} == NOT_FREE.keys()


def change_unchecked(old: Spec, values: dict[str, Any]) -> Spec:
    """The spec with other values, whether they fit each other or not."""
    tree = msgspec.to_builtins(old)
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda section, part: section[part], sections, tree)[name] = value
    return msgspec.convert(tree, Spec)


def whole(keys: Iterable[str]) -> set[str]:
    """The keys of the spec: those of entries, as in `data.sources.code.weight`, are their list's."""
    lists = {key for key, value in (FREE | NOT_FREE).items() if isinstance(value, list)}
    return {next((name for name in lists if key.startswith(f"{name}.")), key) for key in keys}


@given(
    st.sets(st.sampled_from(sorted(FREE))), st.sets(st.sampled_from(sorted(NOT_FREE.keys() - {"model.name"})))
)
def test_exactly_the_keys_that_decide_the_numbers_are_guilty(free: set[str], others: set[str]) -> None:
    old = spec()
    new = change_unchecked(old, {key: (FREE | NOT_FREE)[key] for key in free | others})
    assert whole(guilty(old, new)) == others
    assert whole(trajectory.changes(old, new)) == free | others


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(0, 40),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 60),
)
def test_another_length_is_free_where_the_learning_rates_so_far_are_the_same(
    kind: str, warmup: int, was: int, now: int, steps: int
) -> None:
    assume(warmup <= min(was, now))
    old = spec(scheduler__type=kind, scheduler__warmup_steps=warmup, trainer__max_steps=was)
    new, _ = change(old, [("trainer.max_steps", now)])
    same = all(learning_rate(n, old, was) == learning_rate(n, new, now) for n in range(steps))
    assert guilty(old, new, steps) == ([] if same or was == now else ["trainer.max_steps"])
    if kind == "constant" or steps <= warmup:
        assert same


def test_a_length_is_not_blamed_for_another_learning_rate() -> None:
    old = spec(scheduler__type="constant")
    new, _ = change(old, [("trainer.max_steps", 120), ("optimizer.lr", 1.0)])
    assert guilty(old, new) == ["optimizer.lr"]


@pytest.mark.parametrize("key", ["trainer.epochs", "trainer.total_epochs"])
def test_epochs_replace_steps(key: str) -> None:
    new, _ = change(spec(), [(key, 3)])
    assert (new.trainer.epochs, new.trainer.max_steps) == (3, None)


def test_an_absolute_floor_replaces_the_ratio() -> None:
    new, _ = change(spec(optimizer__lr=1e-3), [("optim.min_lr", 1e-4)])
    assert new.scheduler.min_lr_ratio == pytest.approx(0.1)


def test_every_key_of_the_order_exists() -> None:
    assert set(trajectory._ORDER) <= LEAVES.keys()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 1000), st.integers(0, 1000), st.booleans())
def test_a_fork_goes_on_with_the_sample_where_its_parent_stood(
    batch: int, other_batch: int, step: int, later: int, skipped: bool
) -> None:
    """However the sizes of the batches differ, and whatever the parent left out."""
    order = (OrderStart(step // 2, 10_000),) if skipped else ()
    parent = Run("p", spec=spec(data__train_batch_size=batch), train_digest="d", order=order)
    new, _ = change(parent.spec, [("data.train_batch_size", other_batch), ("optimizer.lr", 0.5)])
    start = trajectory.forked_order(parent, step, new, "d")[0]
    assert start.position(step, other_batch) == parent.sample_position(step)
    assert start.position(step + later, other_batch) == parent.sample_position(step) + later * other_batch
    for other, digest in (
        (change(new, [("model.megatron.seed", 7)])[0], "d"),
        (change(new, [("data.shuffle", False)])[0], "d"),
        (new, "other"),
    ):
        assert trajectory.forked_order(parent, step, other, digest)[0] == OrderStart(step, 0)
    moved, _ = change(new, [("data.train_files", ["/moved"])])
    assert trajectory.forked_order(parent, step, moved, "d")[0] == start


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_behind_its_last_step_a_schedule_stays_at_its_floor(kind: str) -> None:
    config = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}
    asked = [("scheduler.type", kind), ("scheduler.min_lr_ratio", 0.25), ("optimizer.lr", 2.0)]
    spec, _ = parse(config, asked)
    assert [learning_rate(step, spec, 10) for step in (10, 11, 15, 20)] == pytest.approx([0.5] * 4)
