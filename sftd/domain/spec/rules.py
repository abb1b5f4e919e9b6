"""Rules of a spec that need neither model nor data. Those of `launch` are in `launch/rules`, of adapters in `adapter_rules`, of
evaluations in `evaluation_rules`, of mixtures in `mixture/rules`."""

from __future__ import annotations

from collections.abc import Iterator

from sftd.domain.errors import Problem, quote
from sftd.domain.rules import Rules
from sftd.domain.spec import adapter_rules, evaluation_rules
from sftd.domain.spec.launch import rules as launch_rules
from sftd.domain.spec.mixture import rules as mixture_rules
from sftd.domain.spec.sections import Scheduler
from sftd.domain.spec.spec import Spec

# The limit of the views' columns.
LONGEST_NAME = 200
# Full fine-tuning typically uses 1e-6 to 1e-4, adapters 1e-5 to 1e-3, as do small models trained from scratch.
_LEAST_LR, _MOST_LR = 1e-8, 1e-2
_MEGATRON = "model.megatron."
_VPP = _MEGATRON + "virtual_pipeline_model_parallel_size"


def no_model(spec: Spec) -> Iterator[Problem]:
    """A run starts from a model."""
    if not spec.model.partial_pretrain:
        fix = "give the Hugging Face folder of the model to start from"
        yield Problem("model.partial_pretrain", "is not set", fix)


def no_train_files(spec: Spec) -> Iterator[Problem]:
    """A run trains on data."""
    if not spec.data.all_train_files and not spec.data.sources:
        fix = "give at least one Parquet file; `sftd prepare` makes one"
        yield Problem("data.train_files", "is empty", fix)


def unusable_name(spec: Spec) -> Iterator[Problem]:
    """Names must be printable. A run is displayed as project/name, so a project must not contain a slash."""
    project = "trainer.project_name"
    for where, name in (
        (project, spec.trainer.project_name),
        ("trainer.experiment_name", spec.trainer.experiment_name or "unnamed"),
    ):
        fix = f"use printable characters, {LONGEST_NAME} at most"
        if odd := next((c for c in name if not c.isprintable()), None):
            yield Problem(where, f"{quote(name)} contains the character U+{ord(odd):04X}", fix)
        elif not name.strip():
            yield Problem(where, f"{quote(name)} is empty", fix)
        elif len(name) > LONGEST_NAME:
            yield Problem(where, f"{quote(name)} has {len(name)} characters", fix)
        elif "/" in name and where == project:
            fix = "put the part after it into trainer.experiment_name"
            yield Problem(where, f"{quote(name)} contains a slash", fix)


def save_dir_with_nul(spec: Spec) -> Iterator[Problem]:
    """A path cannot contain a NUL character."""
    folder = spec.checkpoint.save_dir
    if "\0" in folder:
        fix = "give a folder that you may write to"
        yield Problem("checkpoint.save_dir", f"{quote(folder)} contains a NUL character", fix)


def virtual_pipeline_alone(spec: Spec) -> Iterator[Problem]:
    """Virtual stages need a pipeline to interleave."""
    m = spec.model.megatron
    if (m.virtual_pipeline_model_parallel_size or 1) > 1 and m.pipeline_model_parallel_size < 2:
        what = "virtual pipelines need a pipeline of at least 2 ranks"
        fix = "set model.megatron.pipeline_model_parallel_size to 2 or more, or drop this key"
        yield Problem(_VPP, what, fix)


def sequence_parallel_alone(spec: Spec) -> Iterator[Problem]:
    """Sequence parallelism splits the sequence over the tensor-parallel ranks."""
    m = spec.model.megatron
    if m.sequence_parallel and m.tensor_model_parallel_size < 2:
        what = "is on, but there is only one tensor-parallel rank"
        fix = "set model.megatron.tensor_model_parallel_size to 2 or more, or turn it off"
        yield Problem(_MEGATRON + "sequence_parallel", what, fix)


def ranks_of_no_whole_copy(spec: Spec) -> Iterator[Problem]:
    """The ranks must hold a whole number of model copies."""
    m, mp = spec.model.megatron, spec.model_parallel_size
    if spec.world_size % mp:
        what = (
            f"{spec.launch.nnodes} × {spec.nproc_per_node} = {spec.world_size} ranks, but one copy of the model takes "
            f"TP {m.tensor_model_parallel_size} × PP {m.pipeline_model_parallel_size} × CP {m.context_parallel_size} = {mp}"
        )
        fix = f"use a multiple of {mp} ranks, or smaller parallel sizes"
        yield Problem("launch.nproc_per_node", what, fix)


def experts_not_shared_evenly(spec: Spec) -> Iterator[Problem]:
    """The ranks of a pipeline stage must share the experts evenly."""
    pp, ep = spec.model.megatron.pipeline_model_parallel_size, spec.model.megatron.expert_model_parallel_size
    stage = spec.world_size // pp
    if stage % ep and not spec.world_size % spec.model_parallel_size:
        what = (
            f"{ep} does not divide the ranks of a pipeline stage, which share the experts: "
            f"{spec.world_size} ranks ÷ PP {pp} = {stage}"
        )
        fix = "use a size that divides them, or another launch.nproc_per_node"
        yield Problem(_MEGATRON + "expert_model_parallel_size", what, fix)


def _has_layout(spec: Spec) -> bool:
    """Whether the ranks fit the layout. Otherwise the rules on batches do not apply."""
    return not any((*ranks_of_no_whole_copy(spec), *experts_not_shared_evenly(spec)))


def packed_micro_batch_too_short(spec: Spec) -> Iterator[Problem]:
    """A packed micro-batch must have room for the longest sample."""
    length = spec.data.sequence_length
    if spec.training.use_rmpad and spec.micro_batch_tokens < length:
        what = (
            f"{spec.training.micro_batch_tokens} is less than data.sequence_length {length}: "
            "the longest sample would not fit"
        )
        yield Problem("training.micro_batch_tokens", what, f"set it to {length} or more")


def rank_without_sample(spec: Spec) -> Iterator[Problem]:
    """With packing, every data-parallel rank needs at least one sample per step."""
    batch, ranks = spec.data.train_batch_size, spec.data_parallel_size
    if spec.training.use_rmpad and batch < ranks and _has_layout(spec):
        what = f"{batch} is less than the {ranks} data-parallel ranks"
        yield Problem("data.train_batch_size", what, f"use {ranks} or more, so that every rank has a sample")


def _has_uneven_batch(spec: Spec) -> bool:
    step = spec.training.micro_batch_size_per_gpu * spec.data_parallel_size
    return bool(spec.data.train_batch_size % step)


def uneven_batch(spec: Spec) -> Iterator[Problem]:
    """Without packing, a step must be a whole number of micro-batches on each rank."""
    micro, dp = spec.training.micro_batch_size_per_gpu, spec.data_parallel_size
    batch, step = spec.data.train_batch_size, micro * dp
    if not spec.training.use_rmpad and _has_layout(spec) and _has_uneven_batch(spec):
        lower = batch - batch % step
        near = f"{lower} or {lower + step}" if lower else f"{step}"
        what = f"{batch} is not a multiple of micro-batch {micro} × data-parallel {dp} = {step}"
        yield Problem(
            "data.train_batch_size", what, f"use {near}, or another training.micro_batch_size_per_gpu"
        )


def uneven_interleaving(spec: Spec) -> Iterator[Problem]:
    """The interleaved schedule needs groups of PP micro-batches. With packing, empty ones fill up a group."""
    m, count = spec.model.megatron, spec.num_microbatches
    pp = m.pipeline_model_parallel_size
    is_padded = not spec.training.use_rmpad and _has_layout(spec) and not _has_uneven_batch(spec)
    if is_padded and (m.virtual_pipeline_model_parallel_size or 1) > 1 and count % pp:
        what = f"the interleaved schedule needs the micro-batches of a step ({count}) to be a multiple of PP ({pp})"
        yield Problem(_VPP, what, "change data.train_batch_size or training.micro_batch_size_per_gpu")


def warm_up_longer_than_run(spec: Spec, planned_steps: int | None = None) -> Iterator[Problem]:
    """The learning rate must reach its peak. Without `trainer.max_steps` the number of steps depends on the data."""
    steps = spec.trainer.max_steps if planned_steps is None else planned_steps
    if steps is not None and spec.warmup_steps(steps) > steps:
        what = f"{spec.scheduler.warmup_steps} is more than the {steps} steps of the run"
        yield Problem("scheduler.warmup_steps", what, "warm up for fewer steps")


def unusual_learning_rate(spec: Spec) -> Iterator[Problem]:
    """A very high peak destroys a pretrained model; a very low one has no effect."""
    lr, usual = spec.optimizer.lr, "full fine-tuning usually uses 1e-6 to 1e-4"
    if spec.model.lora.rank:
        usual = "adapters usually use 1e-5 to 1e-3"
    if lr > _MOST_LR:
        what = f"{lr:g} is far above the usual range for pretrained models: the loss will probably diverge"
        yield Problem("optimizer.lr", what, usual)
    elif lr < _LEAST_LR:
        yield Problem("optimizer.lr", f"{lr:g} is so small that the weights hardly change", usual)


def epochs_and_max_steps(spec: Spec) -> Iterator[Problem]:
    """Only one of the two lengths is used."""
    t = spec.trainer
    if t.max_steps is not None and t.epochs is not None:
        yield Problem("trainer.epochs", f"{t.epochs} is not used: trainer.max_steps={t.max_steps} decides")


def floor_without_decay(spec: Spec) -> Iterator[Problem]:
    """A constant learning rate has no floor."""
    if spec.scheduler.type == "constant" and spec.scheduler.min_lr_ratio:
        what = "is not used: scheduler.type is constant, which has no decay"
        yield Problem("scheduler.min_lr_ratio", what)


def decay_ratio_without_wsd(spec: Spec) -> Iterator[Problem]:
    """Only wsd has a decay of configurable length."""
    if spec.scheduler.type != "wsd" and spec.scheduler.decay_ratio != Scheduler().decay_ratio:
        what = f"is not used: scheduler.type is {spec.scheduler.type}, and only wsd has it"
        yield Problem("scheduler.decay_ratio", what)


def warm_up_twice(spec: Spec) -> Iterator[Problem]:
    """Only one of the two warm-up lengths is used."""
    s = spec.scheduler
    if s.warmup_steps is not None and s.warmup_ratio:
        what = f"is not used: scheduler.warmup_steps={s.warmup_steps} decides"
        yield Problem("scheduler.warmup_ratio", what)


def recompute_turned_off(spec: Spec) -> Iterator[Problem]:
    """The kind of recomputation matters only if recomputation is on."""
    model = spec.model
    if model.recompute != "full" and not model.enable_gradient_checkpointing:
        what = f"{model.recompute} is not used: model.enable_gradient_checkpointing is off"
        yield Problem("model.recompute", what)


def lean_with_fp32_weights(spec: Spec) -> Iterator[Problem]:
    """The lean optimizer keeps no FP32 copy of a weight: it rounds BF16 weights."""
    if spec.optimizer.precision == "lean" and spec.model.megatron.params_dtype == "float32":
        what = "lean keeps BF16 weights, but model.megatron.params_dtype is float32"
        fix = "leave model.megatron.params_dtype at auto, or set optimizer.precision to full"
        yield Problem("optimizer.precision", what, fix)


def optimizer_not_sharded(spec: Spec) -> Iterator[Problem]:
    """The optimizer is always sharded."""
    if not spec.model.megatron.use_distributed_optimizer:
        what = "false is not used: sftd always shards the optimizer, which needs less memory for the same numbers"
        yield Problem(_MEGATRON + "use_distributed_optimizer", what)


def code_of_the_model(spec: Spec) -> Iterator[Problem]:
    """The run's first event contains the warnings, so the log records who allowed the code, and when."""
    if spec.model.trust_remote_code:
        what = "is on: Python code in the model folder runs with your rights"
        yield Problem("model.trust_remote_code", what)


def no_validation(spec: Spec) -> Iterator[Problem]:
    """Without validation there is no best checkpoint."""
    if not spec.data.all_val_files:
        what = "is empty: there is no validation, and keep_best has no effect"
        yield Problem("data.val_files", what)


def micro_batch_size_and_tokens(spec: Spec) -> Iterator[Problem]:
    """With packing, only one of the two micro-batch sizes is used."""
    t = spec.training
    if t.use_rmpad and t.micro_batch_tokens is not None and t.micro_batch_size_per_gpu > 1:
        what = f"{t.micro_batch_size_per_gpu} is not used: training.micro_batch_tokens={t.micro_batch_tokens} decides"
        yield Problem("training.micro_batch_size_per_gpu", what)


def tokens_without_packing(spec: Spec) -> Iterator[Problem]:
    """Without packing, the size of a micro-batch is a number of samples."""
    t = spec.training
    if not t.use_rmpad and t.micro_batch_tokens is not None:
        what = f"{t.micro_batch_tokens} is not used without training.use_rmpad"
        yield Problem("training.micro_batch_tokens", what, "set training.use_rmpad to true, or drop this key")


def micro_batch_never_filled(spec: Spec) -> Iterator[Problem]:
    """A packed micro-batch should not have room for more samples than a rank has in a step."""
    room = spec.micro_batch_tokens // spec.data.sequence_length
    share = -(-spec.data.train_batch_size // spec.data_parallel_size)
    if spec.training.use_rmpad and room > share:
        by_tokens = spec.training.micro_batch_tokens is not None
        name = "micro_batch_tokens" if by_tokens else "micro_batch_size_per_gpu"
        what = f"has room for {room} samples, but a step has at most {share} for each data-parallel rank"
        most = share * spec.data.sequence_length if by_tokens else share
        yield Problem(f"training.{name}", what, f"set it to {most} or less, or raise data.train_batch_size")


def accumulation_that_does_not_decide(spec: Spec) -> Iterator[Problem]:
    """Batch, micro-batch and ranks determine the number of micro-batches per step."""
    given, count = spec.training.gradient_accumulation_steps, spec.num_microbatches
    if given is None or given == count:
        return
    batch, dp = spec.data.train_batch_size, spec.data_parallel_size
    decides = (
        f"the {batch} samples of a step, packed into micro-batches of {spec.micro_batch_tokens} tokens, make at most {count} "
        f"on each of {dp} data-parallel ranks"
        if spec.training.use_rmpad
        else f"data.train_batch_size {batch} ÷ (micro-batch {spec.training.micro_batch_size_per_gpu} × data-parallel {dp}) "
        f"= {count} decides"
    )
    yield Problem(
        "training.gradient_accumulation_steps",
        f"is {given}, but {decides}",
        f"set it to {count} or leave it out",
    )


SPEC = Rules(
    refuse=(
        no_model,
        no_train_files,
        *mixture_rules.MIXTURE.refuse,
        unusable_name,
        save_dir_with_nul,
        virtual_pipeline_alone,
        sequence_parallel_alone,
        *adapter_rules.ADAPTERS.refuse,
        *launch_rules.LAUNCH.refuse,
        *evaluation_rules.EVALUATION.refuse,
        ranks_of_no_whole_copy,
        experts_not_shared_evenly,
        packed_micro_batch_too_short,
        rank_without_sample,
        uneven_batch,
        uneven_interleaving,
        warm_up_longer_than_run,
        lean_with_fp32_weights,
    ),
    warn=(
        *launch_rules.LAUNCH.warn,
        micro_batch_size_and_tokens,
        tokens_without_packing,
        accumulation_that_does_not_decide,
        epochs_and_max_steps,
        floor_without_decay,
        decay_ratio_without_wsd,
        warm_up_twice,
        recompute_turned_off,
        optimizer_not_sharded,
        code_of_the_model,
        no_validation,
        unusual_learning_rate,
        micro_batch_never_filled,
    ),
)
