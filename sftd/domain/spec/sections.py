"""The sections of a spec: names, types, defaults and the check of each value on its own.

A field's `Meta(description=...)` is its documentation: the configuration reference is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sftd.domain.spec.on_resume import FREE, LENGTH

# JSON's numbers, and the database's, are exact up to 2^53.
Size = Annotated[int, Meta(ge=1, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
# 1 is excluded: an Adam moment with beta 1 never moves.
Beta = Annotated[float, Meta(ge=0.0, lt=1.0)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the spec."""


class Megatron(Section, frozen=True):
    """`model.megatron`: how Megatron-core lays the model out over the ranks."""

    tensor_model_parallel_size: Annotated[
        Size,
        Meta(description="ranks that share each layer's matrices (TP)"),
        FREE,
    ] = 1
    pipeline_model_parallel_size: Annotated[
        Size,
        Meta(description="groups of layers on different ranks (PP)"),
        FREE,
    ] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Size | None,
        Meta(
            description="model chunks per pipeline rank (VPP, interleaved schedule); needs PP of at least 2"
        ),
        FREE,
    ] = None
    context_parallel_size: Annotated[Size, Meta(description="ranks that share each sequence (CP)"), FREE] = 1
    expert_model_parallel_size: Annotated[
        Size,
        Meta(description="ranks that share the experts of an MoE layer (EP); any ranks of a pipeline stage"),
        FREE,
    ] = 1
    sequence_parallel: Annotated[
        bool,
        Meta(description="shard norms and residuals over the TP ranks; needs TP of at least 2"),
        FREE,
    ] = False
    use_distributed_optimizer: Annotated[
        bool, Meta(description="shard optimizer state over the data-parallel ranks")
    ] = True
    seed: Annotated[Count, Meta(description="seed of data order, dropout and initialisation")] = 1234
    params_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(
            description="dtype of the weights in forward and backward; auto is bfloat16 on GPUs and float32 on CPUs"
        ),
    ] = "auto"

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Ranks that split each expert."""
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size


Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]


class Lora(Section, frozen=True):
    """`model.lora`: low-rank adapters beside a frozen model, in place of training all its weights."""

    rank: Annotated[
        Count, Meta(description="rank of the adapters (8 to 64 are common); 0 trains the model's own weights")
    ] = 0
    alpha: Annotated[
        Annotated[float, Meta(gt=0.0)],
        Meta(description="an adapter's output is multiplied by alpha / rank"),
    ] = 32.0
    targets: Annotated[
        Literal["all-linear"] | list[Projection],
        Meta(description="the projections that get an adapter (those of experts too), or all-linear"),
    ] = "all-linear"
    rslora: Annotated[bool, Meta(description="multiply by alpha / √rank instead (rank-stabilised LoRA)")] = (
        False
    )
    init: Annotated[
        Literal["kaiming", "gaussian"],
        Meta(
            description="how A begins: uniform in ± 1 / √inputs as in PEFT, or normal with deviation 1 / rank; B is 0"
        ),
    ] = "kaiming"
    adapter: Annotated[
        str, Meta(description="PEFT folder of an adapter to start from, of the same rank and targets")
    ] = ""


class Model(Section, frozen=True):
    """`model`: what is trained."""

    name: Annotated[Literal["megatron-sft"], Meta(description="kind of training")] = "megatron-sft"
    partial_pretrain: Annotated[
        str,
        Meta(
            description="Hugging Face folder of the model to start from, or its hub id where it is in the local cache"
        ),
    ] = ""
    enable_gradient_checkpointing: Annotated[
        bool,
        Meta(description="recompute activations in backward to save memory"),
        FREE,
    ] = False
    recompute: Annotated[
        Literal["full", "selective"],
        Meta(
            description="what gradient checkpointing recomputes: whole layers, or the norms and activations alone "
            "(a third of the memory for a few percent of the time)"
        ),
        FREE,
    ] = "full"
    trust_remote_code: Annotated[bool, Meta(description="allow code shipped in the model folder to run")] = (
        False
    )
    override_config: Annotated[
        dict[str, Any], Meta(description="keys of the model's config.json to replace")
    ] = msgspec.field(default_factory=dict)
    lora: Lora = Lora()
    megatron: Megatron = Megatron()


class Data(Section, frozen=True):
    """`data`: what it is trained on. Parquet with `input_ids`, `attention_mask`, `labels` (see `sftd prepare`)."""

    train_files: Annotated[
        list[str],
        Meta(description="Parquet files to train on; patterns and folders become their files at submit"),
    ] = msgspec.field(default_factory=list)
    val_files: Annotated[list[str], Meta(description="Parquet files to validate on, as train_files")] = (
        msgspec.field(default_factory=list)
    )
    train_batch_size: Annotated[
        Size, Meta(description="samples of one optimizer step over all GPUs: the global or effective batch")
    ] = 64
    sequence_length: Annotated[
        Size, Meta(description="longest sequence in tokens; longer rows are truncated")
    ] = 2048
    truncation: Annotated[
        Literal["right", "left", "error"],
        Meta(description="which end of a row longer than sequence_length is cut, or refuse it"),
    ] = "right"
    shuffle: Annotated[bool, Meta(description="new order each epoch, a function of (seed, epoch) alone")] = (
        True
    )


class Training(Section, frozen=True):
    """`training`: how a batch is computed."""

    micro_batch_size_per_gpu: Annotated[
        Size,
        Meta(description="samples in one forward and backward on one rank, without use_rmpad"),
        FREE,
    ] = 1
    gradient_accumulation_steps: Annotated[
        Size | None,
        Meta(
            description="micro-batches per step on one rank (with use_rmpad the most that there can be); the other keys "
            "decide, this is only compared with them"
        ),
        FREE,
    ] = None
    use_rmpad: Annotated[
        bool,
        Meta(
            description="packing: the samples of a step are laid end to end without padding, and never see each other"
        ),
        FREE,
    ] = False
    deterministic: Annotated[
        bool | None,
        Meta(
            description="the same numbers bit for bit whenever a step is computed again; when not set, on for CPUs "
            "and off for GPUs, where it costs speed"
        ),
        FREE,
    ] = None
    on_non_finite: Annotated[
        Literal["stop", "skip", "rollback"],
        Meta(
            description="when the loss or the gradient norm is not a number: end the run, leave that step's update out, or go "
            "back to the last checkpoint, then on after the samples since"
        ),
        FREE,
    ] = "stop"
    on_spike: Annotated[
        Literal["record", "stop", "skip", "rollback"],
        Meta(description="when the loss spikes (see spike_factor): only record it, or as on_non_finite"),
        FREE,
    ] = "record"
    spike_factor: Annotated[
        NonNegative,
        Meta(description="a loss above this many times the median of the last 64 is a spike; 0 is never"),
        FREE,
    ] = 3.0
    micro_batch_tokens: Annotated[
        Size | None,
        Meta(
            description="with use_rmpad: tokens of a micro-batch (which the CP ranks share), at most; "
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


class Scheduler(Section, frozen=True):
    """`scheduler`: the learning rate over the steps."""

    type: Annotated[
        Literal["constant", "linear", "cosine", "wsd"],
        Meta(description="shape of the decay after warm-up; wsd is constant, then linear over decay_ratio"),
    ] = "cosine"
    warmup_steps: Annotated[
        Count | None, Meta(description="steps of linear warm-up; wins over warmup_ratio")
    ] = None
    warmup_ratio: Annotated[Fraction, Meta(description="warm-up as a share of all steps")] = 0.0
    min_lr_ratio: Annotated[Fraction, Meta(description="lowest learning rate as a share of the peak")] = 0.0
    decay_ratio: Annotated[
        Fraction, Meta(description="with type wsd: the decay at the end as a share of all steps")
    ] = 0.1


class Trainer(Section, frozen=True):
    """`trainer`: how long, and what is done on the way."""

    max_steps: Annotated[Size | None, Meta(description="optimizer steps; wins over epochs"), LENGTH] = None
    epochs: Annotated[
        Size | None,
        Meta(description="passes over the training data; 1 when max_steps is not set either"),
        LENGTH,
    ] = None
    val_check_interval: Annotated[
        Count,
        Meta(description="steps between validations; 0 is only at start and end"),
        FREE,
    ] = 0
    val_before_train: Annotated[bool, Meta(description="validate the untrained model as step 0"), FREE] = True
    save_interval: Annotated[
        Count, Meta(description="steps between checkpoints; 0 is only at the end"), FREE
    ] = 100
    project_name: Annotated[str, Meta(description="groups runs; the MLflow experiment")] = "default"
    experiment_name: Annotated[
        str, Meta(description="a name for people: any printable text; need not be unique")
    ] = ""
    sample_prompts: Annotated[
        list[str],
        Meta(
            description="user messages answered greedily at each validation and recorded as SampleGenerated"
        ),
        FREE,
    ] = msgspec.field(default_factory=list)
    sample_max_tokens: Annotated[Size, Meta(description="longest sample answer in tokens"), FREE] = 64


class Checkpoint(Section, frozen=True):
    """`checkpoint`: what is kept. The newest published checkpoint is always kept."""

    keep_last: Annotated[Size, Meta(description="newest checkpoints to keep"), FREE] = 2
    keep_best: Annotated[
        Count, Meta(description="checkpoints with the lowest validation loss to keep"), FREE
    ] = 1
    keep_every: Annotated[
        Count,
        Meta(description="keep each checkpoint whose step is a multiple of this; 0 is off"),
        FREE,
    ] = 0
    after_success: Annotated[
        Literal["weights", "last", "all"],
        Meta(
            description="what stays whole once the run has succeeded: last keeps the final checkpoint whole, so that the run can be "
            "continued, and of those kept only as the best the weights alone; weights keeps the weights of each alone; all keeps "
            "each whole"
        ),
        FREE,
    ] = "last"
    async_save: Annotated[
        bool,
        Meta(
            description="write checkpoints while training continues, from a copy in host memory; where that does not fit, "
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
    """`launch.slurm`: what the job asks Slurm for; used with `launch.launcher: slurm` only."""

    partition: Annotated[str, Meta(description="partition; empty is the cluster's default"), FREE] = ""
    account: Annotated[
        str, Meta(description="account that is charged; empty is the user's default"), FREE
    ] = ""
    qos: Annotated[str, Meta(description="quality of service; empty is the default"), FREE] = ""
    time: Annotated[
        str | int,
        Meta(
            description="time limit of each job, in Slurm's form (90, 4:00:00, 2-0); empty is the partition's. A run that needs "
            "longer continues in further jobs"
        ),
        FREE,
    ] = ""
    gres: Annotated[
        str,
        Meta(
            description="generic resources of each node, such as gpu:8; when empty, a GPU a rank where launch.device is cuda; "
            "none asks for nothing where nodes come with all their GPUs"
        ),
        FREE,
    ] = ""
    constraint: Annotated[str, Meta(description="features that the nodes must have"), FREE] = ""
    exclude: Annotated[str, Meta(description="nodes that are not used, such as n[3,7-9]"), FREE] = ""
    extra_args: Annotated[
        list[str],
        Meta(description="further options of sbatch, each with its value, such as --mem=0"),
        FREE,
    ] = msgspec.field(default_factory=list)
    setup: Annotated[
        str,
        Meta(description="shell lines that the job runs on its first node before it starts the ranks"),
        FREE,
    ] = ""
    stop_seconds: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="seconds before its time limit at which the job is signalled: the ranks save a checkpoint at the next step and end: "
            "longer than a step and a save take, and a minute more (Slurm's clock is that coarse)",
        ),
        FREE,
    ] = 300


class Launch(Section, frozen=True):
    """`launch`: where it runs."""

    launcher: Annotated[
        Literal["local", "slurm"],
        Meta(
            description="who starts the ranks: the daemon on its own host, or Slurm, to which it hands a job"
        ),
        FREE,
    ] = "local"
    nnodes: Annotated[Size, Meta(description="machines; more than one with the launcher slurm"), FREE] = 1
    nproc_per_node: Annotated[
        Size | None,
        Meta(description="ranks per machine; the least that the layout needs when not set"),
        FREE,
    ] = None
    priority: Annotated[
        int,
        Meta(ge=-1_000_000, le=1_000_000, description="higher starts first; equal ones by age"),
        FREE,
    ] = 0
    preemptible: Annotated[
        bool,
        Meta(
            description="a waiting run of higher priority may take its place: it saves a checkpoint, is queued again and continues "
            "later"
        ),
        FREE,
    ] = False
    max_restarts: Annotated[
        Count,
        Meta(
            description="restarts in a row without progress (a new checkpoint or min_progress_steps); then the run fails"
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
            description="an attempt that records nothing for so long (and for hang_factor median steps) hangs: its stacks are "
            "written down, it is killed and started again; longer than validating or saving takes; at least 900 before the first step; 0 is off"
        ),
        FREE,
    ] = 1800
    hang_factor: Annotated[NonNegative, Meta(description="see hang_seconds"), FREE] = 20.0
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="what the ranks compute on; auto is GPUs where there are any"),
        FREE,
    ] = "auto"
    threads_per_rank: Annotated[
        Size | None,
        Meta(description="CPU threads of each rank on a CPU; all cores shared by the ranks when not set"),
        FREE,
    ] = None
    slurm: Slurm = Slurm()
