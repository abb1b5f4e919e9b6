"""The sections of a spec: names, types, defaults and the check of each value on its own.

A field's `Meta(description=...)` is its documentation: the configuration reference is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sftd.domain.spec.on_resume import FREE, LENGTH

# Numbers in JSON are exact up to 2^53.
Size = Annotated[int, Meta(ge=1, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
# 1 is excluded, because an Adam moment with beta 1 never changes.
Beta = Annotated[float, Meta(ge=0.0, lt=1.0)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the spec."""


class Training(Section, frozen=True):
    """`training`: how a batch is computed."""

    micro_batch_size_per_gpu: Annotated[
        Size,
        Meta(description="samples per forward and backward pass on one rank, without use_rmpad"),
        FREE,
    ] = 1
    gradient_accumulation_steps: Annotated[
        Size | None,
        Meta(
            description="micro-batches per step on one rank (with use_rmpad the maximum); the other keys determine it, and a given "
            "value is only checked"
        ),
        FREE,
    ] = None
    use_rmpad: Annotated[
        bool,
        Meta(
            description="packing: concatenate the samples of a step without padding; samples do not attend to each other"
        ),
        FREE,
    ] = False
    deterministic: Annotated[
        bool | None,
        Meta(
            description="reproduce the same numbers bit for bit when a step is recomputed; when not set, on for CPUs "
            "and off for GPUs, where it is slower"
        ),
        FREE,
    ] = None
    on_non_finite: Annotated[
        Literal["stop", "skip", "rollback"],
        Meta(
            description="when the loss or the gradient norm is not finite: end the run (stop), skip the step's update (skip), or "
            "return to the last checkpoint and skip the samples since (rollback)"
        ),
        FREE,
    ] = "stop"
    on_spike: Annotated[
        Literal["record", "stop", "skip", "rollback"],
        Meta(description="when the loss spikes (see spike_factor): only record it, or act as on_non_finite"),
        FREE,
    ] = "record"
    spike_factor: Annotated[
        NonNegative,
        Meta(description="a loss above this multiple of the median of the last 64 is a spike; 0 is off"),
        FREE,
    ] = 3.0
    micro_batch_tokens: Annotated[
        Size | None,
        Meta(
            description="with use_rmpad: maximum tokens of a micro-batch (over its CP ranks); "
            "micro_batch_size_per_gpu × data.sequence_length when not set"
        ),
        FREE,
    ] = None


class Optimizer(Section, frozen=True):
    """`optimizer`: AdamW."""

    lr: Annotated[NonNegative, Meta(description="peak learning rate")] = 1e-5
    weight_decay: Annotated[
        NonNegative, Meta(description="decoupled weight decay; norms and biases have none")
    ] = 0.01
    adam_beta1: Annotated[Beta, Meta(description="decay of the first moment")] = 0.9
    adam_beta2: Annotated[Beta, Meta(description="decay of the second moment")] = 0.95
    adam_eps: Annotated[float, Meta(gt=0.0, description="added to the root of the second moment")] = 1e-8
    clip_grad: Annotated[
        NonNegative, Meta(description="largest global gradient norm; 0 turns clipping off")
    ] = 1.0
    precision: Annotated[
        Literal["full", "lean"],
        Meta(
            description="full keeps FP32 weights and moments beside BF16 weights (18 bytes a parameter); lean keeps BF16 weights, "
            "rounded stochastically, and smaller moments (at most 10)"
        ),
    ] = "full"


class Scheduler(Section, frozen=True):
    """`scheduler`: the learning rate schedule."""

    type: Annotated[
        Literal["constant", "linear", "cosine", "wsd"],
        Meta(description="shape of the decay after warm-up; wsd is constant, then linear over decay_ratio"),
    ] = "cosine"
    warmup_steps: Annotated[
        Count | None, Meta(description="steps of linear warm-up; overrides warmup_ratio")
    ] = None
    warmup_ratio: Annotated[Fraction, Meta(description="warm-up as a share of all steps")] = 0.0
    min_lr_ratio: Annotated[Fraction, Meta(description="lowest learning rate as a share of the peak")] = 0.0
    decay_ratio: Annotated[
        Fraction, Meta(description="with type wsd: length of the final decay as a share of all steps")
    ] = 0.1


MetricName = Annotated[str, Meta(description="val_loss, or NAME/METRIC of an evaluation")]
Mode = Annotated[Literal["min", "max"], Meta(description="whether a smaller or a larger value is better")]


class EarlyStop(Section, frozen=True):
    """When training ends early: the rule of `trainer.early_stop`."""

    metric: MetricName
    mode: Mode
    patience: Annotated[Size, Meta(description="values in a row that do not improve, after which it stops")]
    min_delta: Annotated[NonNegative, Meta(description="a smaller improvement does not count")] = 0.0


class KeepBest(Section, frozen=True):
    """Which checkpoints are the best, and how many of them stay."""

    metric: MetricName
    mode: Mode
    count: Annotated[Size, Meta(description="number of checkpoints to keep")] = 1


class Trainer(Section, frozen=True):
    """`trainer`: length of the run, validation, saving and names."""

    max_steps: Annotated[Size | None, Meta(description="optimizer steps; overrides epochs"), LENGTH] = None
    epochs: Annotated[
        Size | None,
        Meta(description="passes over the training data; 1 when max_steps is not set either"),
        LENGTH,
    ] = None
    val_check_interval: Annotated[
        Count,
        Meta(description="steps between validations; 0 validates only at start and end"),
        FREE,
    ] = 0
    val_before_train: Annotated[bool, Meta(description="validate the untrained model as step 0"), FREE] = True
    save_interval: Annotated[
        Count, Meta(description="steps between checkpoints; 0 saves only at the end"), FREE
    ] = 100
    project_name: Annotated[str, Meta(description="groups runs; the MLflow experiment")] = "default"
    experiment_name: Annotated[
        str, Meta(description="display name: any printable text; need not be unique")
    ] = ""
    sample_prompts: Annotated[
        list[str],
        Meta(
            description="user messages to answer with greedy decoding at each validation, recorded as SampleGenerated"
        ),
        FREE,
    ] = msgspec.field(default_factory=list)
    sample_max_tokens: Annotated[Size, Meta(description="maximum tokens of a sample answer"), FREE] = 64
    early_stop: Annotated[
        EarlyStop | None,
        Meta(description="end the run when a metric stops improving; null never does"),
        FREE,
    ] = None


class Checkpoint(Section, frozen=True):
    """`checkpoint`: retention and saving. The newest published checkpoint is always kept."""

    keep_last: Annotated[Size, Meta(description="number of newest checkpoints to keep"), FREE] = 2
    keep_best: Annotated[
        Count | KeepBest,
        Meta(description="checkpoints with the lowest validation loss to keep, or a rule by another metric"),
        FREE,
    ] = 1
    keep_every: Annotated[
        Count,
        Meta(description="keep each checkpoint whose step is a multiple of this; 0 turns this off"),
        FREE,
    ] = 0
    after_success: Annotated[
        Literal["weights", "last", "all"],
        Meta(
            description="what to keep of the checkpoints after success: last keeps the final one whole, so that the run can continue, "
            "and only the weights of those kept only as the best; weights keeps only the weights of each; all keeps each whole"
        ),
        FREE,
    ] = "last"
    async_save: Annotated[
        bool,
        Meta(
            description="write checkpoints while training continues, from a copy in host memory; if the copy does not fit, "
            "training waits"
        ),
        FREE,
    ] = False
    save_dir: Annotated[
        str,
        Meta(description="folder for checkpoints; empty is the run's own folder under SFTD_HOME"),
        FREE,
    ] = ""


class Slurm(Section, frozen=True):
    """`launch.slurm`: options of the Slurm job; used only with `launch.launcher: slurm`."""

    partition: Annotated[str, Meta(description="partition; empty is the cluster's default"), FREE] = ""
    account: Annotated[str, Meta(description="account to charge; empty is the user's default"), FREE] = ""
    qos: Annotated[str, Meta(description="quality of service; empty is the default"), FREE] = ""
    time: Annotated[
        str | int,
        Meta(
            description="time limit of each job, in Slurm's format (90, 4:00:00, 2-0); empty is the partition's. A longer run "
            "continues in further jobs"
        ),
        FREE,
    ] = ""
    gres: Annotated[
        str,
        Meta(
            description="generic resources of each node, such as gpu:8; when empty, one GPU per rank if launch.device is cuda; "
            "none requests nothing, for clusters that allocate whole nodes"
        ),
        FREE,
    ] = ""
    constraint: Annotated[str, Meta(description="required features of the nodes"), FREE] = ""
    exclude: Annotated[str, Meta(description="nodes to exclude, such as n[3,7-9]"), FREE] = ""
    extra_args: Annotated[
        list[str],
        Meta(description="further options of sbatch, each with its value, such as --mem=0"),
        FREE,
    ] = msgspec.field(default_factory=list)
    setup: Annotated[
        str,
        Meta(description="shell lines to run on the first node before the ranks start"),
        FREE,
    ] = ""
    stop_seconds: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="seconds before the time limit at which the ranks are signalled to save a checkpoint at the next step and end; "
            "set it to the duration of a step and a save plus one minute, the resolution of Slurm's clock",
        ),
        FREE,
    ] = 300


class Launch(Section, frozen=True):
    """`launch`: where and how the run is started."""

    launcher: Annotated[
        Literal["local", "slurm"],
        Meta(
            description="how the ranks are started: by the daemon on its own host (local), or in a Slurm job (slurm)"
        ),
        FREE,
    ] = "local"
    nnodes: Annotated[Size, Meta(description="machines; more than one needs the launcher slurm"), FREE] = 1
    nproc_per_node: Annotated[
        Size | None,
        Meta(description="ranks per machine; the minimum for the layout when not set"),
        FREE,
    ] = None
    priority: Annotated[
        int,
        Meta(ge=-1_000_000, le=1_000_000, description="runs of higher priority start first, then older runs"),
        FREE,
    ] = 0
    preemptible: Annotated[
        bool,
        Meta(
            description="let a waiting run of higher priority preempt this run, which saves a checkpoint, is queued again and "
            "continues later"
        ),
        FREE,
    ] = False
    max_restarts: Annotated[
        Count,
        Meta(
            description="maximum restarts in a row without progress (a new checkpoint or min_progress_steps) before the run fails"
        ),
        FREE,
    ] = 2
    min_progress_steps: Annotated[
        Size,
        Meta(description="new steps that count as progress without a new checkpoint"),
        FREE,
    ] = 200
    hang_seconds: Annotated[
        Count,
        Meta(
            description="seconds without a record (and at least hang_factor median steps) after which an attempt counts as hung: its "
            "stacks are recorded, and it is killed and restarted; must exceed the time of a validation or a save; before the first "
            "step at least 900 apply; 0 turns this off"
        ),
        FREE,
    ] = 1800
    hang_factor: Annotated[NonNegative, Meta(description="see hang_seconds"), FREE] = 20.0
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="device of the ranks; auto uses GPUs if there are any"),
        FREE,
    ] = "auto"
    threads_per_rank: Annotated[
        Size | None,
        Meta(description="threads of each rank on CPUs; when not set, the ranks share all cores"),
        FREE,
    ] = None
    slurm: Slurm = Slurm()
