"""From what a user writes to a spec: aliases, refusals, defaults, digests."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.domain.errors import Refused
from sftd.domain.spec.aliases import ALIASES
from sftd.domain.spec.parse import LEAVES, parse
from sftd.domain.spec.sections import Checkpoint
from sftd.domain.spec.spec import Spec, canonical_json, spec_digest

MINIMAL = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"], "val_files": ["/v"]}}


def spec_of(**overrides: Any) -> Spec:
    return parse(MINIMAL, [(k.replace("__", "."), v) for k, v in overrides.items()])[0]


def problems_of(*overrides: tuple[str, Any], config: dict[str, Any] = MINIMAL) -> dict[str, str]:
    with pytest.raises(Refused) as refused:
        parse(config, overrides)
    assert refused.value.exit_code == 2
    return {p.where: f"{p.what} | {p.fix}" for p in refused.value.problems}


def warnings_of(*overrides: tuple[str, Any]) -> dict[str, str]:
    return {w.where: f"{w.what} | {w.fix}" for w in parse(MINIMAL, overrides)[1]}


def leaf(spec: Spec, path: str) -> Any:
    node: Any = spec
    for name in path.split("."):
        node = getattr(node, name)
    return node


# alias → (value, canonical key, value there, what else must be set for it to fit)
TRANSLATED: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "model.path": ("/other", "model.partial_pretrain", "/other", {}),
    "model.lora_rank": (8, "model.lora.rank", 8, {}),
    "model.lora_alpha": (8, "model.lora.alpha", 8.0, {"model.lora.rank": 8}),
    "model.target_modules": ("q_proj", "model.lora.targets", ["q"], {"model.lora.rank": 8}),
    "model.use_remove_padding": (True, "training.use_rmpad", True, {}),
    "engine.tensor_model_parallel_size": (2, "model.megatron.tensor_model_parallel_size", 2, {}),
    "engine.pipeline_model_parallel_size": (2, "model.megatron.pipeline_model_parallel_size", 2, {}),
    "engine.virtual_pipeline_model_parallel_size": (
        2,
        "model.megatron.virtual_pipeline_model_parallel_size",
        2,
        {"model.megatron.pipeline_model_parallel_size": 2},
    ),
    "engine.expert_model_parallel_size": (1, "model.megatron.expert_model_parallel_size", 1, {}),
    "engine.context_parallel_size": (1, "model.megatron.context_parallel_size", 1, {}),
    "engine.use_distributed_optimizer": (False, "model.megatron.use_distributed_optimizer", False, {}),
    "engine.sequence_parallel": (
        True,
        "model.megatron.sequence_parallel",
        True,
        {"model.megatron.tensor_model_parallel_size": 2},
    ),
    "optim.lr": (3e-4, "optimizer.lr", 3e-4, {}),
    "optim.betas": ([0.8, 0.99], "optimizer.adam_beta2", 0.99, {}),
    "optim.weight_decay": (0.1, "optimizer.weight_decay", 0.1, {}),
    "optim.clip_grad": (0, "optimizer.clip_grad", 0.0, {}),
    "optim.lr_warmup_steps": (5, "scheduler.warmup_steps", 5, {}),
    "optim.lr_warmup_steps_ratio": (0.1, "scheduler.warmup_ratio", 0.1, {}),
    "optim.lr_decay_style": ("linear", "scheduler.type", "linear", {}),
    "data.micro_batch_size_per_gpu": (4, "training.micro_batch_size_per_gpu", 4, {}),
    "data.max_length": (512, "data.sequence_length", 512, {}),
    "trainer.total_epochs": (3, "trainer.epochs", 3, {}),
    "trainer.total_training_steps": (30, "trainer.max_steps", 30, {}),
    "trainer.save_freq": (7, "trainer.save_interval", 7, {}),
    "trainer.test_freq": (-1, "trainer.val_check_interval", 0, {}),
    "trainer.max_ckpt_to_keep": (5, "checkpoint.keep_last", 5, {}),
    "trainer.seed": (7, "model.megatron.seed", 7, {}),
    "trainer.nnodes": (1, "launch.nnodes", 1, {}),
    "trainer.n_gpus_per_node": (4, "launch.nproc_per_node", 4, {}),
    "trainer.device": ("cpu", "launch.device", "cpu", {}),
    "trainer.default_local_dir": ("/c", "checkpoint.save_dir", "/c", {}),
    "training.packing": (True, "training.use_rmpad", True, {}),
    "use_remove_padding": (True, "training.use_rmpad", True, {}),
    "ulysses_sequence_parallel_size": (1, "model.megatron.context_parallel_size", 1, {}),
    "optim.lr_scheduler": ("linear", "scheduler.type", "linear", {}),
    "optim.lr_scheduler_type": ("linear", "scheduler.type", "linear", {}),
    "optim.min_lr_ratio": (0.1, "scheduler.min_lr_ratio", 0.1, {}),
}
UNTRANSLATABLE = {"data.messages_key", "trainer.resume_mode", "optim.min_lr"}


@pytest.mark.parametrize("alias", sorted(TRANSLATED))
def test_every_alias_lands_on_its_key(alias: str) -> None:
    value, key, expected, beside = TRANSLATED[alias]
    spec, _ = parse(MINIMAL, [*beside.items(), (alias, value)])
    assert leaf(spec, key) == expected


def test_no_alias_is_untested() -> None:
    assert set(ALIASES) == set(TRANSLATED) | UNTRANSLATABLE


def test_an_alias_in_the_file_does_as_its_key() -> None:
    by_alias = parse({**MINIMAL, "optim": {"lr": 1e-4, "betas": [0.9, 0.98]}})[0]
    by_key = parse({**MINIMAL, "optimizer": {"lr": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.98}})[0]
    assert by_alias == by_key


def test_two_names_that_differ_are_refused_and_two_that_agree_are_not() -> None:
    config = {**MINIMAL, "optim": {"lr": 1e-4}, "optimizer": {"lr": 1e-5}}
    assert "is another name for `optim.lr`" in problems_of(config=config)["optimizer.lr"]
    assert parse({**config, "optimizer": {"lr": 1e-4}})[0].optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data.messages_key", "messages", "sftd prepare"),
        ("trainer.resume_mode", "disable", "--from-step"),
        ("trainer.max_ckpt_to_keep", -1, "checkpoint.keep_last"),
        ("optim.betas", 0.9, "two numbers"),
        ("optim.betas", [0.9], "two numbers"),
    ],
)
def test_an_alias_without_an_equal_says_what_to_write(key: str, value: Any, says: str) -> None:
    assert says in problems_of((key, value))[key]


def test_the_resume_mode_that_sftd_has_is_accepted() -> None:
    assert spec_of(trainer__resume_mode="auto") == spec_of()


def test_null_leaves_an_alias_out_and_unsets_what_may_be_unset() -> None:
    config = {**MINIMAL, "launch": {"nproc_per_node": 2}}
    assert parse(config, [("trainer.n_gpus_per_node", None)])[0].world_size == 1
    for alias in ("trainer.device", "data.max_length", "optim.lr", "trainer.default_local_dir"):
        assert spec_of(**{alias.replace(".", "__"): None}) == spec_of()


def test_that_checkpoints_are_bounded_is_a_warning_where_verl_keeps_all() -> None:
    assert (
        "checkpoint.keep_last decides"
        in warnings_of(("trainer.max_ckpt_to_keep", None))["trainer.max_ckpt_to_keep"]
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", "x" * 10_000),
        ("optimizer.lr", list(range(10_000))),
        ("model.override_config", ["y" * 1000] * 1000),
        ("trainer.experiment_name", "z" * 10_000),
        ("trainer.resume_mode", "m" * 10_000),
        ("optim.min_lr", "m" * 10_000),
        ("launch.slurm.partition", "p q" * 10_000),
        ("k" * 10_000, 1),
        ("optimizer", "s" * 10_000),
    ],
)
def test_a_message_quotes_at_most_200_characters_of_a_value(key: str, value: Any) -> None:
    with pytest.raises(Refused) as refused:
        parse(MINIMAL, [("launch.launcher", "slurm"), (key, value)])
    for problem in refused.value.problems:
        assert max(map(len, (problem.where, problem.what, problem.fix))) < 400


@pytest.mark.parametrize("none", [-1, None])
def test_never_is_zero(none: int | None) -> None:
    assert spec_of(trainer__save_freq=none).trainer.save_interval == 0
    assert spec_of(optim__lr_warmup_steps=none).scheduler.warmup_steps is None


def test_an_absolute_floor_becomes_a_ratio_of_the_peak() -> None:
    assert spec_of(optim__lr=1e-4, optim__min_lr=1e-5).scheduler.min_lr_ratio == pytest.approx(0.1)
    for bad in (1.0, -1e-9, "low", True, None):
        if bad is not None:
            assert "not between 0 and optimizer.lr" in problems_of(("optim.min_lr", bad))["optim.min_lr"]
    assert spec_of(optim__min_lr=None).scheduler.min_lr_ratio == 0.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        # Unknown keys, with the nearest known one.
        ("optimizer.learning_rate", 1, "write `optimizer.lr`"),
        ("optimizer.lrr", 1, "did you mean `optimizer.lr`"),
        ("lr", 1, "did you mean `"),
        ("training.tensor_model_parallel_size", 2, "tensor_model_parallel_size`"),
        ("zzz", 1, "lists every key"),
        # A value of a wrong type or out of range.
        ("optimizer.lr", "fast", "give a number"),
        ("optimizer.lr", -1.0, "give a number"),
        ("optimizer.lr", True, "give a number"),
        ("optimizer.lr", float("nan"), "give a number"),
        ("optimizer.lr", float("inf"), "not a finite number"),
        ("optimizer.adam_beta1", 1.0, "give a number"),
        ("data.train_batch_size", 0, "give a whole number"),
        ("data.train_batch_size", 1.5, "give a whole number"),
        ("data.truncation", "middle", "one of error, left, right"),
        ("data.shuffle", "yes", "yes, no, on and off are texts"),
        ("training.deterministic", "on", "true or false or null; yes, no, on and off are texts"),
        ("data.truncation", "no", "give one of error, left, right"),
        ("data.train_files", [1], "a list of texts"),
        ("model.lora.targets", "q,x", "a list of some of all-linear, down, gate"),
        ("trainer.max_steps", 0, "a whole number or null"),
        ("model.override_config", 3, "a mapping"),
        ("model.name", "other", "one of megatron-sft"),
        # What does not fit together.
        ("model.partial_pretrain", "", "Hugging Face folder"),
        ("data.train_files", [], "at least one Parquet file"),
        ("trainer.project_name", "a/b", "contains a slash"),
        ("trainer.project_name", "", "is empty"),
        ("trainer.experiment_name", "a\tb", "U+0009"),
        ("model.megatron.virtual_pipeline_model_parallel_size", 2, "at least 2 ranks"),
        ("model.megatron.sequence_parallel", True, "tensor_model_parallel_size to 2 or more"),
        ("launch.nnodes", 2, "launch.launcher to slurm"),
        ("data.train_batch_size", 65, "use 64 or 80"),
    ],
)
def test_a_bad_value_is_refused_where_it_stands(key: str, value: Any, says: str) -> None:
    found = problems_of(*([("training.micro_batch_size_per_gpu", 16)] if value == 65 else []), (key, value))
    assert says in found[key]


@pytest.mark.parametrize("path", LEAVES)
def test_every_key_says_what_it_takes(path: str) -> None:
    assert "| give " in problems_of((path, object()))[path]


def test_a_packed_micro_batch_holds_the_longest_sample() -> None:
    found = problems_of(
        ("training.use_rmpad", True), ("training.micro_batch_tokens", 2047), ("data.sequence_length", 2048)
    )
    assert "set it to 2048 or more" in found["training.micro_batch_tokens"]


def test_packed_any_batch_goes_that_gives_each_rank_a_sample() -> None:
    packed = [("training.use_rmpad", True), ("launch.nproc_per_node", 3)]
    assert "use 3 or more" in problems_of(*packed, ("data.train_batch_size", 2))["data.train_batch_size"]
    spec = spec_of(
        training__use_rmpad=True,
        training__micro_batch_tokens=5000,
        launch__nproc_per_node=3,
        data__train_batch_size=64,
    )
    # Two samples of 2048 tokens fit into one: 64 ÷ (2 × 3), rounded up.
    assert (spec.micro_batch_tokens, spec.num_microbatches) == (5000, 11)
    assert spec_of(training__micro_batch_size_per_gpu=4).micro_batch_tokens == 4 * 2048
    interleaved = spec_of(
        training__use_rmpad=True,
        data__train_batch_size=5,
        model__megatron__pipeline_model_parallel_size=2,
        model__megatron__virtual_pipeline_model_parallel_size=2,
    )
    assert interleaved.num_microbatches == 6


def test_ranks_that_do_not_divide_are_refused() -> None:
    found = problems_of(("launch.nproc_per_node", 3), ("model.megatron.tensor_model_parallel_size", 2))
    assert "use a multiple of 2 ranks" in found["launch.nproc_per_node"]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    found = problems_of(("trainer.max_steps", 5), ("scheduler.warmup_steps", 6))
    assert "more than the 5 steps" in found["scheduler.warmup_steps"]


def test_interleaving_needs_micro_batches_in_multiples_of_the_pipeline() -> None:
    key = "model.megatron.virtual_pipeline_model_parallel_size"
    found = problems_of(
        ("model.megatron.pipeline_model_parallel_size", 2), (key, 2), ("data.train_batch_size", 3)
    )
    assert "multiple of PP (2)" in found[key]


def test_a_value_where_a_section_belongs_is_refused_and_an_empty_section_is_not() -> None:
    assert "is a section" in problems_of(config={**MINIMAL, "optimizer": 3})["optimizer"]
    assert parse({**MINIMAL, "optimizer": None})[0] == parse(MINIMAL)[0]


def test_every_problem_is_told_at_once() -> None:
    found = problems_of(("optimizer.lr", "x"), ("data.batch", 1), ("trainer.max_steps", -3))
    assert set(found) == {"optimizer.lr", "data.batch", "trainer.max_steps"}


def test_keys_that_are_not_texts_are_refused_not_crashed_on() -> None:
    assert "unknown key" in problems_of(config={**MINIMAL, 3: 4})["3"]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([("trainer.max_steps", 5), ("trainer.epochs", 2)], "trainer.epochs"),
        ([("scheduler.warmup_steps", 5), ("scheduler.warmup_ratio", 0.5)], "scheduler.warmup_ratio"),
        ([("data.val_files", [])], "data.val_files"),
        ([("training.gradient_accumulation_steps", 3)], "training.gradient_accumulation_steps"),
        ([("training.micro_batch_tokens", 4096)], "training.micro_batch_tokens"),
        ([("model.recompute", "selective")], "model.recompute"),
        (
            [("scheduler.type", "constant"), ("scheduler.min_lr_ratio", 0.1)],
            "scheduler.min_lr_ratio",
        ),
        (
            [
                ("training.use_rmpad", True),
                ("training.micro_batch_tokens", 4096),
                ("training.micro_batch_size_per_gpu", 2),
            ],
            "training.micro_batch_size_per_gpu",
        ),
    ],
)
def test_what_is_not_used_is_warned_of(overrides: list[tuple[str, Any]], where: str) -> None:
    assert where in warnings_of(*overrides)


def test_a_plain_config_has_no_warning() -> None:
    assert warnings_of() == {}


def test_later_overrides_win_over_earlier_and_all_over_the_file() -> None:
    config = {**MINIMAL, "optimizer": {"lr": 1e-3}}
    assert parse(config, [("optimizer.lr", 1e-4), ("optim.lr", 1e-5)])[0].optimizer.lr == 1e-5
    assert parse(config, [("+optimizer.lr", 1e-4)])[0].optimizer.lr == 1e-4


def test_one_text_is_a_list_of_one() -> None:
    assert spec_of(data__train_files="/one").data.train_files == ["/one"]


def test_a_spec_is_resolved() -> None:
    spec = spec_of(model__megatron__tensor_model_parallel_size=2, data__train_batch_size=8)
    assert (spec.launch.nproc_per_node, spec.training.gradient_accumulation_steps) == (2, 8)
    assert (spec.trainer.epochs, spec.trainer.max_steps) == (1, None)
    assert spec_of(trainer__max_steps=9, trainer__epochs=2).trainer.epochs is None


def test_resolving_twice_changes_nothing() -> None:
    spec = spec_of(model__megatron__tensor_model_parallel_size=2)
    again, _ = parse(msgspec.to_builtins(spec))
    assert canonical_json(again) == canonical_json(spec)


def test_planned_steps_see_every_row() -> None:
    spec = spec_of(data__train_batch_size=4, trainer__epochs=3)
    assert [spec.planned_steps(rows) for rows in (1, 4, 5, 10)] == [1, 3, 4, 8]
    assert spec_of(trainer__max_steps=7).planned_steps(10_000) == 7


def test_warm_up_in_steps_wins_over_the_ratio() -> None:
    assert spec_of(scheduler__warmup_ratio=0.25).warmup_steps(10) == 2
    assert spec_of(scheduler__warmup_ratio=0.25, scheduler__warmup_steps=1).warmup_steps(10) == 1


def test_the_digest_is_pinned() -> None:
    """A digest names a spec for years: a new default or a renamed key must be a decision, not an accident."""
    assert spec_digest(spec_of()) == "fc092bf50c978eb6fdb417a29f27e85fd17cbfac3c052e50f95320632956a5c7"


def test_the_digest_does_not_depend_on_how_the_spec_was_written() -> None:
    other = {"data": {"val_files": "/v", "train_files": "/t"}, "model": {"path": "/m"}, "optim": {"lr": 1e-5}}
    assert spec_digest(parse(other)[0]) == spec_digest(spec_of())


@given(st.sampled_from(sorted(LEAVES)))
def test_every_key_has_a_default_that_it_accepts(path: str) -> None:
    default = leaf(Spec(), path)
    assert msgspec.convert(msgspec.to_builtins(default), LEAVES[path]) == default


def test_a_key_that_was_added_leaves_older_digests_as_they_were() -> None:
    # Of commit 658ac74, which did not have the key.
    before = "0210202572d2156f4f23ee9ff5c1c7b4b9ba373fa77931ac095c371002333c45"
    assert spec_digest(Spec()) == before
    assert spec_digest(Spec(checkpoint=Checkpoint(after_success="all"))) != before
