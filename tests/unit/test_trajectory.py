"""What may change while a run stays the same run, and where a fork begins to read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sftd.domain import trajectory
from sftd.domain.run import Run
from sftd.domain.schedule import learning_rate
from sftd.domain.spec import OrderStart, Spec
from sftd.domain.spec_parse import LEAVES, change, parse

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
    "launch.nproc_per_node": 8,
    "launch.priority": 3,
    "launch.max_restarts": 9,
    "model.megatron.tensor_model_parallel_size": 2,
    "model.megatron.pipeline_model_parallel_size": 2,
    "model.megatron.context_parallel_size": 2,
    "model.enable_gradient_checkpointing": True,
    "training.micro_batch_size_per_gpu": 2,
    "training.use_rmpad": True,
    "training.deterministic": True,
    "trainer.save_interval": 7,
    "trainer.val_check_interval": 7,
    "trainer.sample_prompts": ["Why?"],
    "checkpoint.keep_last": 5,
    "checkpoint.keep_every": 5,
    "checkpoint.save_dir": "/elsewhere",
}
NOT_FREE = {
    "optimizer.lr": 1.0,
    "optimizer.clip_grad": 3.0,
    "optimizer.weight_decay": 0.5,
    "scheduler.type": "linear",
    "scheduler.warmup_steps": 5,
    "data.train_batch_size": 128,
    "data.sequence_length": 64,
    "data.shuffle": False,
    "data.val_files": ["/v"],
    "model.megatron.seed": 1,
    "model.megatron.params_dtype": "float32",
    "model.partial_pretrain": "/other",
    "model.override_config": {"rope_theta": 5.0},
    "trainer.experiment_name": "other",
}


@given(st.sets(st.sampled_from(sorted(FREE))), st.sets(st.sampled_from(sorted(NOT_FREE))))
def test_exactly_the_keys_that_decide_the_numbers_are_guilty(free: set[str], others: set[str]) -> None:
    old = spec()
    new, _ = change(old, [(key, (FREE | NOT_FREE)[key]) for key in free | others])
    assert set(guilty(old, new)) == others
    named = set(trajectory.changes(old, new))
    assert free | others <= named
    assert named <= free | others | {"launch.nproc_per_node"}


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
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


def test_every_free_key_exists() -> None:
    for prefix in (*trajectory._FREE, *trajectory.LENGTH, *trajectory._ORDER):
        assert any(key.startswith(prefix) for key in LEAVES), prefix


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 1000), st.integers(0, 1000), st.booleans())
def test_a_fork_goes_on_with_the_sample_where_its_parent_stood(
    batch: int, other_batch: int, step: int, later: int, skipped: bool
) -> None:
    """However the sizes of the batches differ, and whatever the parent left out."""
    order = (OrderStart(step // 2, 10_000),) if skipped else ()
    parent = Run("p", spec=spec(data__train_batch_size=batch), train_digest="d", order=order)
    new, _ = change(parent.spec, [("data.train_batch_size", other_batch), ("optimizer.lr", 0.5)])
    start = trajectory.forked_order(parent, step, new, "d")
    assert start.position(step, other_batch) == parent.sample_position(step)
    assert start.position(step + later, other_batch) == parent.sample_position(step) + later * other_batch
    for other, digest in (
        (change(new, [("model.megatron.seed", 7)])[0], "d"),
        (change(new, [("data.shuffle", False)])[0], "d"),
        (new, "other"),
    ):
        assert trajectory.forked_order(parent, step, other, digest) == OrderStart(step, 0)
    moved, _ = change(new, [("data.train_files", ["/moved"])])
    assert trajectory.forked_order(parent, step, moved, "d") == start


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_behind_its_last_step_a_schedule_stays_at_its_floor(kind: str) -> None:
    config = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}
    asked = [("scheduler.type", kind), ("scheduler.min_lr_ratio", 0.25), ("optimizer.lr", 2.0)]
    spec, _ = parse(config, asked)
    assert [learning_rate(step, spec, 10) for step in (10, 11, 15, 20)] == pytest.approx([0.5] * 4)
