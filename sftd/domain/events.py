"""The facts that the log holds. Type names and fields are contracts: never edited once published, only versioned
(see `codec`). Times are whole microseconds since the Unix epoch (UTC); durations are seconds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from sftd.domain.model_files import ModelFiles

Micros = int
# What becomes of a run whose attempt was asked to stop.
AfterStop = Literal["cancelled", "paused", "queued"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A fact. The class's name is its type name in the log; `schema_version` counts its shapes."""

    schema_version: ClassVar[int] = 1


class RunSubmitted(Event, frozen=True):
    """A run was asked for. `spec` is the resolved spec; `data` and `model` are what submit found in the files, `model_files`
    what the model folder held, None where an older sftd did not record it."""

    schema_version: ClassVar[int] = 2

    spec: dict[str, Any]
    spec_digest: str
    planned_steps: int
    user: str
    data: dict[str, Any]
    model: dict[str, Any]
    sftd_version: str
    warnings: list[str] = []
    model_files: ModelFiles | None = None


class RunForked(Event, frozen=True):
    """The run starts from another run's checkpoint, with another spec: the first event of its stream, before
    `RunSubmitted`. `step` 0 is the parent's pretrained model, without a checkpoint.

    `changes` maps the keys whose values differ to [the parent's, the fork's]. Training goes on at 0-based step `step` and
    reads the samples from position `sample` of its own order of samples (see `sample_order`): where the parent stood, if
    the fork has the parent's order, else its beginning.
    """

    parent: str
    step: int
    sample: int
    checkpoint: str | None
    manifest_digest: str | None
    bytes: int
    tokens_total: int
    changes: dict[str, Any]
    by: str


class CheckpointPinned(Event, frozen=True):
    """`fork` starts from this checkpoint, so it is never deleted."""

    step: int
    fork: str


class CheckpointUnpinned(Event, frozen=True):
    """`fork`, which started from this checkpoint, was removed: it does not keep the checkpoint any more."""

    step: int
    fork: str


class AttemptClaimed(Event, frozen=True):
    """A daemon took the right to drive the next attempt. It starts from `from_step` (0 is the pretrained model)."""

    daemon: str
    host: str
    from_step: int
    checkpoint: str | None = None


class AttemptLaunched(Event, frozen=True):
    """torchrun was started. `pid` and `create_time` (seconds since the epoch) together identify the process."""

    pid: int
    create_time: float
    host: str
    directory: str
    argv: list[str]
    devices: list[str]


class AttemptAdopted(Event, frozen=True):
    """Another daemon took over a living attempt."""

    daemon: str
    host: str
    pid: int


class ModelLoaded(Event, frozen=True):
    """Every rank holds its weights. `environment` is what decides the numbers: versions, device, threads, layout."""

    architecture: str
    parameters: int
    dtype: str
    device: str
    seconds: float
    environment: dict[str, Any]

    @property
    def is_deterministic(self) -> bool:
        """Whether this attempt's steps come out bit for bit when they are computed again."""
        return bool(self.environment.get("deterministic", True))


class WeightsDigested(Event, frozen=True):
    """All bytes of the weight files that the attempt loaded, before its first step. `files` maps their names to digests:
    sha256 over the size and the sha256 of each piece of 64 MiB, so that ranks can share the work. `seconds` is how long
    it took, mostly in the background."""

    files: dict[str, str]
    bytes: int
    seconds: float


class DataBound(Event, frozen=True):
    """The data files are open and the order of samples is fixed. Digests are sha256 over the files."""

    train_rows: int
    train_digest: str
    val_rows: int
    val_digest: str
    truncated_rows: int
    dropped_rows: int
    steps_per_epoch: float
    planned_steps: int


class TrainingResumed(Event, frozen=True):
    """The attempt goes on from the checkpoint of `step`; steps after it in earlier attempts are redone."""

    step: int
    path: str
    tokens_total: int


class StepCompleted(Event, frozen=True):
    """One optimizer step. `loss` is the mean over the trained tokens of the global batch, `grad_norm` is before clipping.

    `tokens` are trained (label is not -100), `tokens_real` not padding, `tokens_padded` all that was computed.
    `tokens_total` are the trained tokens of all steps up to this one. `samples_digest` is a sha256 over the
    global row numbers in order. `mfu` is the share of the devices' peak FLOP/s that the model's own FLOPs took, None where
    the peak is not known; `peak_memory_bytes` the most that any rank has had in use so far (on a GPU its tensors', on a
    CPU the process's).
    """

    schema_version: ClassVar[int] = 2

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_real: int
    tokens_padded: int
    tokens_total: int
    samples: int
    samples_digest: str
    seconds: float
    mfu: float | None = None
    peak_memory_bytes: int | None = None


class ValidationCompleted(Event, frozen=True):
    """The whole validation set was evaluated: `loss` is the mean over its `tokens` trained tokens."""

    step: int
    loss: float
    tokens: int
    rows: int
    seconds: float


class SampleGenerated(Event, frozen=True):
    """A fixed prompt was answered greedily with the model of `step`."""

    step: int
    prompt: str
    text: str
    tokens: int
    stopped: bool


class CheckpointStarted(Event, frozen=True):
    """A checkpoint is being staged."""

    step: int


class CheckpointPublished(Event, frozen=True):
    """A checkpoint is complete on the disk under its final name. `manifest_digest` is the sha256 of its manifest."""

    step: int
    path: str
    bytes: int
    manifest_digest: str
    seconds: float


class CheckpointRejected(Event, frozen=True):
    """A checkpoint did not verify and will not be used."""

    step: int
    path: str
    reason: str


class CheckpointDeleted(Event, frozen=True):
    """Retention took a checkpoint away."""

    step: int
    path: str
    bytes: int
    reason: str


class CheckpointReduced(Event, frozen=True):
    """The training state of a checkpoint was deleted, its weights are kept: the model can be exported and answers, but training
    cannot continue from it. `path`, `bytes` and `manifest_digest` are those of the folder that is left, in the place of
    `former_path`; `freed_bytes` were deleted."""

    step: int
    path: str
    former_path: str
    bytes: int
    freed_bytes: int
    manifest_digest: str


class AnomalyDetected(Event, frozen=True):
    """Something that must not be: a redone step that differs from the log, a loss that is not a number."""

    step: int
    what: str
    detail: dict[str, Any] = {}


class SamplesSkipped(Event, frozen=True):
    """Training goes back to the checkpoint of `step` and on at position `sample` of the order of samples: those in between
    led to what `reason` says, and are left out."""

    step: int
    sample: int
    reason: str


class StopRequested(Event, frozen=True):
    """The run shall not go on: a person cancels or pauses it, or `preempted_by`, a run of higher priority, needs its
    devices. `then` is what follows; `now` kills the attempt, else it saves a checkpoint at the next step boundary."""

    schema_version: ClassVar[int] = 2

    by: str
    reason: str = ""
    then: AfterStop = "cancelled"
    now: bool = False
    preempted_by: str | None = None


class RunDeferred(Event, frozen=True):
    """The run does not start before these runs have succeeded."""

    after: list[str]


class SweepJoined(Event, frozen=True):
    """The run is one point of a sweep; `values` are the settings that make it this point."""

    sweep: str
    values: dict[str, Any]


class RunHeld(Event, frozen=True):
    """A person keeps a waiting run from starting."""

    by: str
    reason: str = ""


class RunReleased(Event, frozen=True):
    """A held run waits for its turn again."""

    by: str


class AttemptPaused(Event, frozen=True):
    """The attempt ended because a person paused the run; `step` is where the next one goes on."""

    step: int
    by: str


class AttemptPreempted(Event, frozen=True):
    """The attempt made room for another run, and its own run is queued again in its old place; `step` is where the next
    attempt goes on. `by_run` is empty when Slurm took the machines back: `reason` says why."""

    schema_version: ClassVar[int] = 2

    step: int
    by_run: str
    reason: str = ""


class JobReported(Event, frozen=True):
    """What Slurm says of an attempt's job, each time that it says something else. `state` and `reason` are in its words;
    the state is `NOT OBSERVED` while its controller does not answer, and `NOT SUBMITTED` until it has taken the job."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""


class ResumeRequested(Event, frozen=True):
    """A person asked for another attempt. `from_step` None is the last published checkpoint.

    `changes` maps keys of the spec to [before, after]; only such as leave the trajectory alone (`trajectory.py`). With
    changes, `spec`, `spec_digest` and `planned_steps` hold from now on.
    """

    schema_version: ClassVar[int] = 2

    by: str
    from_step: int | None = None
    changes: dict[str, Any] = {}
    spec: dict[str, Any] | None = None
    spec_digest: str | None = None
    planned_steps: int | None = None


class AttemptFailed(Event, frozen=True):
    """An attempt ended before its run did. `evidence` are the lines that prove the cause."""

    cause: str
    message: str
    exit_code: int | None
    evidence: list[str] = []
    retry_at: Micros | None = None


class AttemptLost(Event, frozen=True):
    """An attempt's process is gone without a word (killed with its supervisor, host restarted)."""

    message: str
    retry_at: Micros | None = None


class RunSucceeded(Event, frozen=True):
    """Planned steps and counted tokens equal what the log holds, and the final checkpoint is published."""

    steps: int
    tokens: int
    final_checkpoint: str


class RunFailed(Event, frozen=True):
    """The run ended without success, and sftd will not try again by itself."""

    cause: str
    message: str


class RunCancelled(Event, frozen=True):
    """The run ended because it was asked to."""

    by: str


class RunRemoved(Event, frozen=True):
    """A person removed the files of a run that had ended: its checkpoints, of which each has a `CheckpointDeleted`, and its
    attempts. `freed_bytes` were deleted. Its events stay."""

    by: str
    freed_bytes: int


class ModelExported(Event, frozen=True):
    """The model of a checkpoint was written as a Hugging Face folder. `digest` is a sha256 over its files, `dtype` that of
    its weights."""

    step: int
    path: str
    bytes: int
    digest: str
    dtype: str


class ModelRegistered(Event, frozen=True):
    """An exported model was put into MLflow's model registry as `name`, `model_version`; `digest` is the export's."""

    step: int
    name: str
    model_version: str
    digest: str
    by: str


class ReplayVerified(Event, frozen=True):
    """Steps behind `from_step` up to `to_step` were trained again elsewhere and came out as the log has them: bit for bit,
    or but for rounding where `is_exact` is false. `environment` maps what differs to [the log's, the verifier's]."""

    from_step: int
    to_step: int
    is_exact: bool
    environment: dict[str, Any]
    by: str


class ReplayDiverged(Event, frozen=True):
    """Steps behind `from_step` were trained again elsewhere, and `step` is the first that came out otherwise. `detail` is
    that of `AnomalyDetected`, `environment` maps what differs to [the log's, the verifier's]."""

    from_step: int
    to_step: int
    step: int
    detail: dict[str, Any]
    environment: dict[str, Any]
    by: str


class GpuSample(msgspec.Struct, frozen=True):
    """One GPU at a moment, by NVML's index. What its driver does not tell is None."""

    index: int
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_watts: float | None


class SystemSampled(Event, frozen=True):
    """What the host of an attempt was doing, as its daemon saw it: CPU (the mean of all cores since the sample before) and
    memory of the whole host, and the GPUs that the attempt holds."""

    host: str
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    gpus: list[GpuSample] = []


EVENT_TYPES: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event in its place in the log: one row of the events table."""

    position: int
    event_id: str
    run_id: str
    version: int
    type: str
    schema_version: int
    occurred_at: Micros
    recorded_at: Micros
    attempt: int | None
    actor: str
    causation_id: str | None
    event: Event


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event about to be appended to a run's stream."""

    event: Event
    event_id: str
    occurred_at: Micros
    actor: str
    attempt: int | None = None
    causation_id: str | None = None
