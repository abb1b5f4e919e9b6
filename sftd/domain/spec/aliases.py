"""Names of other trainers that sftd accepts for its own keys, because they mean the same: most are verl's.

Names that sftd knows and does not accept are in `other_trainers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class UnusableAlias(Exception):
    """An alias was used with a value that has no equal here; the text says what to write instead."""


class UnusedAlias(Exception):
    """An alias was used with a value that is left aside; the text says what sftd does."""


def _same(target: str) -> Callable[[Any], dict[str, Any]]:
    # verl's stock configs name keys that they do not set: null is to leave the key out.
    return lambda value: {} if value is None else {target: value}


def _same_or_null(target: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {target: value}


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UnusableAlias("write two numbers, as [0.9, 0.95]")
    return {"optimizer.adam_beta1": value[0], "optimizer.adam_beta2": value[1]}


def _interval(target: str) -> Callable[[Any], dict[str, Any]]:
    # verl writes -1 for "never".
    return lambda value: {target: 0 if value in (-1, None) else value}


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


def _warmup_steps(value: Any) -> dict[str, Any]:
    # verl writes -1 for "use the ratio".
    return {"scheduler.warmup_steps": None if value in (-1, None) else value}


# In verl's stock config: a folder of its own for each run, which is sftd's default.
_STOCK_FOLDER = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"


def _local_dir(value: Any) -> dict[str, Any]:
    return {} if value in (None, _STOCK_FOLDER) else {"checkpoint.save_dir": value}


_MEGATRON = "model.megatron."
ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.path": _same("model.partial_pretrain"),
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
    "engine.virtual_pipeline_model_parallel_size": _same_or_null(
        _MEGATRON + "virtual_pipeline_model_parallel_size"
    ),
    "ulysses_sequence_parallel_size": _same(_MEGATRON + "context_parallel_size"),
    "optim.lr": _same("optimizer.lr"),
    "optim.betas": _betas,
    "optim.weight_decay": _same("optimizer.weight_decay"),
    "optim.clip_grad": _same("optimizer.clip_grad"),
    "optim.lr_warmup_steps": _warmup_steps,
    "optim.lr_warmup_steps_ratio": _same("scheduler.warmup_ratio"),
    "optim.lr_decay_style": _same("scheduler.type"),
    "optim.lr_scheduler": _same("scheduler.type"),
    "optim.lr_scheduler_type": _same("scheduler.type"),
    "optim.min_lr_ratio": _same("scheduler.min_lr_ratio"),
    "data.micro_batch_size_per_gpu": _same("training.micro_batch_size_per_gpu"),
    "data.max_length": _same("data.sequence_length"),
    "data.messages_key": _messages_key,
    "trainer.total_epochs": _same("trainer.epochs"),
    "trainer.total_training_steps": _same("trainer.max_steps"),
    "trainer.save_freq": _interval("trainer.save_interval"),
    "trainer.test_freq": _interval("trainer.val_check_interval"),
    "trainer.max_ckpt_to_keep": _keep_last,
    "trainer.resume_mode": _resume_mode,
    "trainer.seed": _same(_MEGATRON + "seed"),
    "trainer.nnodes": _same("launch.nnodes"),
    "trainer.n_gpus_per_node": _same_or_null("launch.nproc_per_node"),
    "trainer.device": _same("launch.device"),
    "trainer.default_local_dir": _local_dir,
}
# An absolute floor can only be turned into a ratio once the peak is known.
MIN_LR = "optim.min_lr"


def targets(alias: str) -> list[str]:
    """The keys of sftd that an alias sets; none where it sets nothing, or is only refused with what to do instead."""
    if alias == MIN_LR:
        return ["scheduler.min_lr_ratio"]
    for probe in (1, [0, 0], "auto"):
        try:
            return list(ALIASES[alias](probe))
        except UnusableAlias:
            continue
    return []
