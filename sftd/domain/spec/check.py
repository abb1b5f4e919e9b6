"""What must fit together inside a spec, whatever the model and the data are (for those see `layout`)."""

from __future__ import annotations

from sftd.domain.errors import Problem, quote
from sftd.domain.spec.launchers import kind_of
from sftd.domain.spec.sections import Scheduler
from sftd.domain.spec.spec import Spec

# What the views' columns hold.
LONGEST_NAME = 200


def check(spec: Spec) -> tuple[list[Problem], list[Problem]]:
    """Returns (problems, warnings)."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    m = spec.model.megatron
    if not spec.model.partial_pretrain:
        problems.append(
            Problem(
                "model.partial_pretrain",
                "is not set",
                "give the Hugging Face folder of the model to start from",
            )
        )
    if not spec.data.train_files:
        problems.append(
            Problem(
                "data.train_files", "is empty", "give at least one Parquet file; `sftd prepare` makes one"
            )
        )
    for where, name in (
        ("trainer.project_name", spec.trainer.project_name),
        ("trainer.experiment_name", spec.trainer.experiment_name or "unnamed"),
    ):
        problems += _check_name(where, name)
    if (
        m.virtual_pipeline_model_parallel_size
        and m.virtual_pipeline_model_parallel_size > 1
        and m.pipeline_model_parallel_size < 2
    ):
        problems.append(
            Problem(
                "model.megatron.virtual_pipeline_model_parallel_size",
                "virtual pipelines need a pipeline of at least 2 ranks",
                "set model.megatron.pipeline_model_parallel_size to 2 or more, or drop this key",
            )
        )
    if m.sequence_parallel and m.tensor_model_parallel_size < 2:
        problems.append(
            Problem(
                "model.megatron.sequence_parallel",
                "is on, but there is one tensor-parallel rank to share the sequence with",
                "set model.megatron.tensor_model_parallel_size to 2 or more, or turn it off",
            )
        )
    found, doubtful = kind_of(spec.launch.launcher).supports(spec)
    problems += found
    warnings += doubtful
    mp = spec.model_parallel_size
    if spec.world_size % mp:
        problems.append(
            Problem(
                "launch.nproc_per_node",
                f"{spec.launch.nnodes} × {spec.nproc_per_node} = {spec.world_size} ranks, but one copy of the model takes "
                f"TP {m.tensor_model_parallel_size} × PP {m.pipeline_model_parallel_size} × CP {m.context_parallel_size} = {mp}",
                f"use a multiple of {mp} ranks, or smaller parallel sizes",
            )
        )
    elif spec.world_size // m.pipeline_model_parallel_size % m.expert_model_parallel_size:
        problems.append(
            Problem(
                "model.megatron.expert_model_parallel_size",
                f"{m.expert_model_parallel_size} does not divide the ranks of a pipeline stage, which share the experts: "
                f"{spec.world_size} ranks ÷ PP {m.pipeline_model_parallel_size} = "
                f"{spec.world_size // m.pipeline_model_parallel_size}",
                "use a size that divides them, or another launch.nproc_per_node",
            )
        )
    else:
        problems += _check_batch(spec, warnings)
    t = spec.trainer
    if t.max_steps is not None and t.epochs is not None:
        warnings.append(
            Problem("trainer.epochs", f"{t.epochs} is not used: trainer.max_steps={t.max_steps} decides")
        )
    if t.max_steps is not None and spec.warmup_steps(t.max_steps) > t.max_steps:
        problems.append(
            Problem(
                "scheduler.warmup_steps",
                f"{spec.scheduler.warmup_steps} is more than the {t.max_steps} steps of the run",
                "warm up for fewer steps",
            )
        )
    if spec.scheduler.type == "constant" and spec.scheduler.min_lr_ratio:
        warnings.append(
            Problem("scheduler.min_lr_ratio", "is not used: scheduler.type constant has no decay to end")
        )
    if spec.scheduler.type != "wsd" and spec.scheduler.decay_ratio != Scheduler().decay_ratio:
        what = f"is not used: scheduler.type is {spec.scheduler.type}, and only wsd has it"
        warnings.append(Problem("scheduler.decay_ratio", what))
    if spec.scheduler.warmup_steps is not None and spec.scheduler.warmup_ratio:
        warnings.append(
            Problem(
                "scheduler.warmup_ratio",
                f"is not used: scheduler.warmup_steps={spec.scheduler.warmup_steps} decides",
            )
        )
    if spec.model.recompute != "full" and not spec.model.enable_gradient_checkpointing:
        warnings.append(
            Problem(
                "model.recompute",
                f"{spec.model.recompute} is not used: model.enable_gradient_checkpointing is off",
            )
        )
    if not m.use_distributed_optimizer:
        warnings.append(
            Problem(
                "model.megatron.use_distributed_optimizer",
                "false is not used: sftd always shards the optimizer, with the same numbers and less memory",
            )
        )
    if spec.model.trust_remote_code:
        # Warnings are in the run's first event: the log says whose code was let in, and when.
        warnings.append(
            Problem("model.trust_remote_code", "is on: Python code in the model folder runs with your rights")
        )
    if not spec.data.val_files:
        warnings.append(
            Problem(
                "data.val_files", "is empty: nothing will be validated, and keep_best has nothing to go by"
            )
        )
    return problems, warnings


def _check_name(where: str, name: str) -> list[Problem]:
    """Names are for people and never paths. A run is shown as project/name, so a project has no slash."""
    fix = f"use printable characters, {LONGEST_NAME} at most"
    if odd := next((c for c in name if not c.isprintable()), None):
        return [Problem(where, f"{quote(name)} holds the character U+{ord(odd):04X}", fix)]
    if not name.strip():
        return [Problem(where, f"{quote(name)} is empty", fix)]
    if len(name) > LONGEST_NAME:
        return [Problem(where, f"{quote(name)} has {len(name)} characters", fix)]
    if "/" in name and where == "trainer.project_name":
        return [
            Problem(
                where, f"{quote(name)} holds a slash", "put the part after it into trainer.experiment_name"
            )
        ]
    return []


def _check_batch(spec: Spec, warnings: list[Problem]) -> list[Problem]:
    problems = _check_packed(spec, warnings) if spec.training.use_rmpad else _check_padded(spec, warnings)
    said = spec.training.gradient_accumulation_steps
    if not problems and said is not None and said != spec.num_microbatches:
        decides = (
            f"packed into micro-batches of {spec.micro_batch_tokens} tokens the {spec.data.train_batch_size} samples of a "
            f"step make {spec.num_microbatches} or fewer on each of {spec.data_parallel_size} data-parallel ranks"
            if spec.training.use_rmpad
            else f"data.train_batch_size {spec.data.train_batch_size} ÷ (micro-batch {spec.training.micro_batch_size_per_gpu}"
            f" × data-parallel {spec.data_parallel_size}) = {spec.num_microbatches} decides"
        )
        warnings.append(
            Problem(
                "training.gradient_accumulation_steps",
                f"says {said}, but {decides}",
                f"set it to {spec.num_microbatches} or leave it out",
            )
        )
    return problems


def _check_packed(spec: Spec, warnings: list[Problem]) -> list[Problem]:
    t, length = spec.training, spec.data.sequence_length
    if spec.micro_batch_tokens < length:
        return [
            Problem(
                "training.micro_batch_tokens",
                f"{t.micro_batch_tokens} is less than data.sequence_length {length}: the longest sample would not fit",
                f"set it to {length} or more",
            )
        ]
    if spec.data.train_batch_size < spec.data_parallel_size:
        return [
            Problem(
                "data.train_batch_size",
                f"{spec.data.train_batch_size} is less than the {spec.data_parallel_size} data-parallel ranks",
                f"use {spec.data_parallel_size} or more, so that every rank has a sample",
            )
        ]
    if t.micro_batch_tokens is not None and t.micro_batch_size_per_gpu > 1:
        warnings.append(
            Problem(
                "training.micro_batch_size_per_gpu",
                f"{t.micro_batch_size_per_gpu} is not used: training.micro_batch_tokens={t.micro_batch_tokens} decides",
            )
        )
    return []


def _check_padded(spec: Spec, warnings: list[Problem]) -> list[Problem]:
    if spec.training.micro_batch_tokens is not None:
        warnings.append(
            Problem(
                "training.micro_batch_tokens",
                f"{spec.training.micro_batch_tokens} is not used without training.use_rmpad",
                "set training.use_rmpad to true, or drop this key",
            )
        )
    micro, dp, batch = (
        spec.training.micro_batch_size_per_gpu,
        spec.data_parallel_size,
        spec.data.train_batch_size,
    )
    if batch % (micro * dp):
        lower = batch - batch % (micro * dp)
        near = f"{lower} or {lower + micro * dp}" if lower else f"{micro * dp}"
        return [
            Problem(
                "data.train_batch_size",
                f"{batch} is not a multiple of micro-batch {micro} × data-parallel {dp} = {micro * dp}",
                f"use {near}, or another training.micro_batch_size_per_gpu",
            )
        ]
    m = spec.model.megatron
    vpp, pp = m.virtual_pipeline_model_parallel_size or 1, m.pipeline_model_parallel_size
    if vpp > 1 and spec.num_microbatches % pp:
        return [
            Problem(
                "model.megatron.virtual_pipeline_model_parallel_size",
                f"the interleaved schedule needs the micro-batches of a step ({spec.num_microbatches}) to be a multiple of PP ({pp})",
                "change data.train_batch_size or training.micro_batch_size_per_gpu",
            )
        ]
    return []
