"""Key names of other trainers that sftd accepts as aliases, because they have the same meaning. Most are from verl.

Names that sftd recognises but does not accept are in `other_trainers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sftd.domain.errors import shorten
from sftd.domain.spec.model_section import ALL_LINEAR, PROJECTIONS


class UnusableAlias(Exception):
    """The value of an alias has no equivalent in sftd. The message is the fix."""


class UnusedAlias(Exception):
    """The value of an alias is ignored. The message describes what sftd does instead."""


class Alias(NamedTuple):
    """The `keys` that an alias sets; empty if it sets nothing or is always refused. `translate` returns the values of these keys
    for a value of the alias; it raises `UnusableAlias` and `UnusedAlias`."""

    keys: tuple[str, ...]
    translate: Callable[[Any], dict[str, Any]]


def _same(key: str, *, null: bool = False) -> Alias:
    # verl's stock configs list unset keys as null, so null omits the key unless it is one of its values.
    return Alias((key,), lambda value: {} if value is None and not null else {key: value})


def _never(key: str, never: int | None) -> Alias:
    # verl writes -1 for "never" or "not set".
    return Alias((key,), lambda value: {key: never if value in (-1, None) else value})


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UnusableAlias("write two numbers, as [0.9, 0.95]")
    return {"optimizer.adam_beta1": value[0], "optimizer.adam_beta2": value[1]}


def _keep_last(value: Any) -> dict[str, Any]:
    if value == -1:
        raise UnusableAlias("sftd always bounds its checkpoints; set checkpoint.keep_last to a number")
    if value is None:
        raise UnusedAlias("null keeps every checkpoint in verl; here checkpoint.keep_last decides")
    return {"checkpoint.keep_last": value}


def _resume_mode(value: Any) -> dict[str, Any]:
    if value != "auto":
        raise UnusableAlias(
            "sftd always resumes a run by itself; use `sftd resume RUN --from-step N` for another checkpoint"
        )
    return {}


def _messages_key(value: Any) -> dict[str, Any]:
    raise UnusableAlias("sftd trains on tokenised Parquet; run `sftd prepare --messages-key KEY …` first")


def _target(name: Any) -> Any:
    return name.removesuffix("_proj") if isinstance(name, str) else name


def _targets(value: Any) -> dict[str, Any]:
    names = list(map(_target, value if isinstance(value, list) else [value]))
    if odd := [name for name in names if name not in (ALL_LINEAR, *PROJECTIONS)]:
        known = ", ".join((ALL_LINEAR, *PROJECTIONS))
        raise UnusableAlias(f"{shorten(str(odd[0]))} gets no adapter here; write some of {known}")
    return {LORA_TARGETS: names}


# The value in verl's stock config: one folder per run, which is sftd's default.
_STOCK_FOLDER = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"


def _local_dir(value: Any) -> dict[str, Any]:
    return {} if value in (None, _STOCK_FOLDER) else {"checkpoint.save_dir": value}


_MEGATRON = "model.megatron."
# Not a key of the spec: `parse` divides this absolute floor by the peak to get scheduler.min_lr_ratio.
MIN_LR = "optim.min_lr"
LORA_ALPHA, LORA_TARGETS = "model.lora_alpha", "model.target_modules"
# No keys of the spec either: `parse` drops them without a rank, because verl's stock config has them beside `lora_rank: 0`.
WITH_RANK = {LORA_ALPHA: "model.lora.alpha", LORA_TARGETS: "model.lora.targets"}
ALIASES: dict[str, Alias] = {
    "model.path": _same("model.partial_pretrain"),
    "model.lora_rank": _same("model.lora.rank"),
    LORA_ALPHA: Alias(("model.lora.alpha",), lambda value: {} if value is None else {LORA_ALPHA: value}),
    LORA_TARGETS: Alias(("model.lora.targets",), lambda value: {} if value is None else _targets(value)),
    "model.use_remove_padding": _same("training.use_rmpad"),
    "use_remove_padding": _same("training.use_rmpad"),
    "training.packing": _same("training.use_rmpad"),
    **{
        f"engine.{name}": _same(_MEGATRON + name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "context_parallel_size",
            "use_distributed_optimizer",
            "sequence_parallel",
        )
    },
    "engine.virtual_pipeline_model_parallel_size": _same(
        _MEGATRON + "virtual_pipeline_model_parallel_size", null=True
    ),
    "ulysses_sequence_parallel_size": _same(_MEGATRON + "context_parallel_size"),
    "optim.lr": _same("optimizer.lr"),
    "optim.betas": Alias(("optimizer.adam_beta1", "optimizer.adam_beta2"), _betas),
    "optim.weight_decay": _same("optimizer.weight_decay"),
    "optim.clip_grad": _same("optimizer.clip_grad"),
    "optim.lr_warmup_steps": _never("scheduler.warmup_steps", None),
    "optim.lr_warmup_steps_ratio": _same("scheduler.warmup_ratio"),
    "optim.lr_decay_style": _same("scheduler.type"),
    "optim.lr_scheduler": _same("scheduler.type"),
    "optim.lr_scheduler_type": _same("scheduler.type"),
    "optim.min_lr_ratio": _same("scheduler.min_lr_ratio"),
    "data.micro_batch_size_per_gpu": _same("training.micro_batch_size_per_gpu"),
    "data.max_length": _same("data.sequence_length"),
    "data.messages_key": Alias((), _messages_key),
    "trainer.total_epochs": _same("trainer.epochs"),
    "trainer.total_training_steps": _same("trainer.max_steps"),
    "trainer.save_freq": _never("trainer.save_interval", 0),
    "trainer.test_freq": _never("trainer.val_check_interval", 0),
    "trainer.max_ckpt_to_keep": Alias(("checkpoint.keep_last",), _keep_last),
    "trainer.resume_mode": Alias((), _resume_mode),
    "trainer.seed": _same(_MEGATRON + "seed"),
    "trainer.nnodes": _same("launch.nnodes"),
    "trainer.n_gpus_per_node": _same("launch.nproc_per_node", null=True),
    "trainer.device": _same("launch.device"),
    "trainer.default_local_dir": Alias(("checkpoint.save_dir",), _local_dir),
    MIN_LR: Alias(("scheduler.min_lr_ratio",), lambda value: {} if value is None else {MIN_LR: value}),
}
