"""Duration of a step and of a run, from measured rates or from the pace of earlier runs. docs/plan.md has the sources."""

from __future__ import annotations

import math

import msgspec

from sftd.domain.data.facts import DataFacts
from sftd.domain.model.flops import peak_flops, training_flops
from sftd.domain.model.parameters import held
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import adapted_products
from sftd.domain.plan import experts
from sftd.domain.plan.batch import Workload
from sftd.domain.plan.sizes import NF4_BYTES, WEIGHT_BYTES, weights_dtype, whole_recomputed
from sftd.domain.spec.spec import Spec

# Share of the BF16 peak that the trainer's arithmetic reaches, without the separate terms below. Fitted to the 1B and 7B
# shapes of docs/benchmarks.md on H100 and H200.
_SHARE = 0.553
# Rates for other devices and dtypes are assumed.
_MEASURED = ("H100", "H200")
# Host time and kernel launches of a layer per micro-batch, in seconds. Fitted to 2, 4 and 8 rows of the 1B shape.
_LAYER_SECONDS = 0.28e-3
# Seconds per element of normalised queries and keys: these operations are not fused.
_QK_NORM_SECONDS = 67e-12
# Factors for deterministic kernels, full or selective recomputation, and each doubling of TP.
_DETERMINISTIC = 1.05
_RECOMPUTED = {"full": 4 / 3, "selective": 1.12}
_TENSOR_PARALLEL = 1.07
# The same share with adapters, whose frozen matrices have no FP32 gradient to accumulate; and bytes per second that a GPU reads
# and writes of its own memory. Fitted to, and measured with the 8B shape on an H200.
_ADAPTED_SHARE = 0.613
_MEMORY_BYTES = 3.4e12
# How often adapters read or write inputs and outputs of their products: A x and its gradients, B and its own.
_ADAPTER_PASSES = 4
# Bytes per second between GPUs of a host, for gradients and weights. Assumed.
_LINK_BYTES = 300e9
# FP32 FLOP/s of a CPU core, and seconds per parameter for AdamW and gloo's copies. Measured with the demo on two cores.
_CORE_FLOPS = 75e9
_CPU_PARAMETER_SECONDS = 10e-9
# Seconds before the first step, and checkpoint bytes per second. Measured on one disk and one H100.
_START_SECONDS = {"cpu": 25.0, "cuda": 45.0}
_DISK_BYTES = {"cpu": 0.55e9, "cuda": 1.15e9}


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in seconds. `basis` is the source of the rate: "measured" (docs/benchmarks.md), "assumed", or "log" (earlier
    runs, whose steps took `calibration` times the formula's prediction)."""

    step: float
    steps: int
    training: float
    validating: float
    saving: float
    starting: float
    basis: str
    calibration: float = 1.0
    mfu: float | None = None

    @property
    def total(self) -> float:
        """Duration of the whole run, without time in the queue."""
        return self.training + self.validating + self.saving + self.starting


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine of a run: `device` is `cuda` or `cpu`, `name` is torch's device name, `cores` are those of the host."""

    device: str
    name: str
    cores: int = 1


def pace(
    spec: Spec,
    shape: ModelShape,
    work: Workload,
    machine: Machine,
    *,
    val: DataFacts | None,
    planned_steps: int,
    first_step: int = 0,
    checkpoint_bytes: int,
    calibration: float | None = None,
) -> Pace:
    """The pace of a run. `calibration` is from earlier runs, None without any."""
    seconds, basis = step_seconds(spec, shape, work, machine)
    if calibration is not None:
        seconds, basis = seconds * calibration, "log"
    steps = max(0, planned_steps - first_step)
    saves = len(save_steps(spec, planned_steps, first_step))
    saving = saves * checkpoint_bytes / _DISK_BYTES[machine.device]
    peak = peak_flops(machine.name, weights_dtype(spec, machine.device))
    useful = training_flops(shape, round(work.real), work.squares, spec.model)
    return Pace(
        step=seconds,
        steps=steps,
        training=steps * seconds,
        validating=_validations(spec, planned_steps, first_step)
        * _validation_seconds(spec, shape, work, val, seconds),
        # An asynchronous save hardly delays training, but the run waits for its last save.
        saving=saving / max(saves, 1) if spec.checkpoint.async_save else saving,
        starting=_START_SECONDS[machine.device],
        basis=basis,
        calibration=1.0 if calibration is None else calibration,
        mfu=useful / (seconds * peak * spec.world_size) if peak else None,
    )


def step_seconds(spec: Spec, shape: ModelShape, work: Workload, machine: Machine) -> tuple[float, str]:
    """(seconds of an optimizer step by the formula, basis: "measured" or "assumed")."""
    m = spec.model.megatron
    tokens = round(work.computed)
    flops = whole = training_flops(shape, tokens, work.squares)
    is_adapted, fully = spec.model.lora.rank > 0, whole_recomputed(spec, shape)
    if spec.model.enable_gradient_checkpointing:
        # With adapters, the passes of selective recomputation are counted by their bytes.
        selective = 1.0 if is_adapted and machine.device == "cuda" else _RECOMPUTED["selective"]
        flops *= fully * _RECOMPUTED["full"] + (1 - fully) * selective
    # Forward, and with it what is recomputed, does not know what is frozen.
    flops += training_flops(shape, tokens, work.squares, spec.model) - whole
    if machine.device == "cpu":
        # The ranks share the cores, and each rank updates and copies its own parameters.
        threads = spec.launch.threads_per_rank
        cores = min(machine.cores, threads * spec.world_size) if threads else machine.cores
        parameters = sum(held(spec, shape, stage).trained for stage in range(m.pipeline_model_parallel_size))
        copies = spec.world_size // m.pipeline_model_parallel_size
        return flops / (cores * _CORE_FLOPS) + parameters * copies * _CPU_PARAMETER_SECONDS, "assumed"
    peak = peak_flops(machine.name, "bfloat16")
    is_measured = peak is not None and any(name in machine.name for name in _MEASURED)
    dtype = weights_dtype(spec, machine.device)
    # Assumed: FP32 products run at a tenth of the BF16 rate.
    rate = (
        (_ADAPTED_SHARE if is_adapted else _SHARE) * (peak or 989e12) * (1.0 if dtype == "bfloat16" else 0.1)
    )
    seconds = flops / (rate * spec.world_size)
    if shape.qk_norm:
        elements = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
        normed = work.computed * shape.num_hidden_layers * elements
        seconds += normed * _QK_NORM_SECONDS / spec.world_size
    if is_adapted:
        passed = _adapter_elements(spec, shape) + _recomputed_elements(spec, shape)
        seconds += work.computed * passed * WEIGHT_BYTES[dtype] / _MEMORY_BYTES / spec.world_size
    if shape.num_experts:
        moved = shape.expert_layers * experts.moved_bytes(shape, WEIGHT_BYTES[dtype])
        seconds += work.computed * moved / _MEMORY_BYTES / spec.world_size
    seconds *= _TENSOR_PARALLEL ** math.log2(m.tensor_model_parallel_size)
    if spec.training.deterministic:
        seconds *= _DETERMINISTIC
    pp, vpp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    layers = shape.num_hidden_layers // pp
    stages = [held(spec, shape, stage) for stage in range(pp)]
    quantized = max(stage.quantized for stage in stages)
    seconds += work.micro_batches * layers * _LAYER_SECONDS
    if shape.num_experts and not is_adapted:
        # Each micro-batch reads and writes the FP32 gradients of all experts, however few of its tokens one has.
        seconds += work.micro_batches * 8 * max(stage.trained for stage in stages) / _MEMORY_BYTES
    seconds += work.micro_batches * quantized * _decompressed_bytes(spec, shape, dtype) / _MEMORY_BYTES
    seconds *= 1 + (pp - 1) / (work.micro_batches * vpp)
    ranks = spec.data_parallel_size * m.context_parallel_size
    most = max(stage.trained for stage in stages)
    # Reduction of FP32 gradients (4 bytes) and gathering of BF16 weights (2 bytes).
    seconds += 6 * most * (ranks - 1) / ranks / _LINK_BYTES
    is_measured = is_measured and not shape.num_experts
    return seconds, "measured" if is_measured and dtype == "bfloat16" else "assumed"


def _adapter_elements(spec: Spec, shape: ModelShape) -> float:
    """Elements that the adapters of all layers read and write for a token, over the ranks that share it."""
    chosen, found = spec.model.lora.projections, 0
    for parts in adapted_products(shape):
        if any(weight.projection in chosen for weight in parts):
            times = shape.num_experts_per_tok if parts[0].is_expert else 1
            found += times * (parts[0].columns + sum(weight.rows for weight in parts))
    return float(_ADAPTER_PASSES * shape.num_hidden_layers * found)


def _recomputed_elements(spec: Spec, shape: ModelShape) -> float:
    """Elements that selective recomputation reads and writes for a token: both norms and SwiGLU."""
    if not spec.model.enable_gradient_checkpointing:
        return 0.0
    layers = (1 - whole_recomputed(spec, shape)) * shape.num_hidden_layers
    if shape.num_experts:
        return layers * (2 + shape.num_experts_per_tok) * shape.hidden_size
    return layers * (4 * shape.hidden_size + 3 * shape.intermediate_size)


def _decompressed_bytes(spec: Spec, shape: ModelShape, dtype: str) -> float:
    """Bytes read and written per quantised parameter and micro-batch: once in forward and in backward, and where recomputed."""
    return (2 + whole_recomputed(spec, shape)) * (NF4_BYTES + WEIGHT_BYTES[dtype])


def save_steps(spec: Spec, planned_steps: int, first_step: int = 0) -> list[int]:
    """The steps after `first_step` at which a checkpoint is saved."""
    every = spec.trainer.save_interval
    found = [] if not every else list(range((first_step // every + 1) * every, planned_steps, every))
    return [*found, planned_steps]


def _validations(spec: Spec, planned_steps: int, first_step: int) -> int:
    if not spec.data.all_val_files:
        return 0
    every = spec.trainer.val_check_interval
    between = (planned_steps - 1) // every - first_step // every if every else 0
    return between + 1 + spec.trainer.val_before_train


def _validation_seconds(
    spec: Spec, shape: ModelShape, work: Workload, val: DataFacts | None, step: float
) -> float:
    if val is None:
        return 0.0
    # A forward pass is a third of a step's arithmetic, and of one that leaves matrices frozen a larger part.
    whole = training_flops(shape, round(work.computed), work.squares)
    useful = training_flops(shape, round(work.computed), work.squares, spec.model)
    return step / 3 * (whole / useful) * (val.seen_tokens or val.tokens) / max(work.real, 1.0)
