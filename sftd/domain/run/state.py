"""The state of a run. Only `evolve` creates states, from events."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sftd.domain.data.facts import SourceFacts
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.log import events as e
from sftd.domain.log.timeline import order_up_to
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec

Status = Literal[
    "queued",  # waits for its turn                           → starting, held, cancelled
    "retrying",  # waits until retry_at after a failure        → starting, held, cancelled
    "held",  # a user keeps it from starting                  → queued, retrying, cancelled
    "starting",  # claimed or launched, no step yet            → running, retrying, failed
    "running",  # steps are being recorded                     → stopping, succeeded, retrying, failed
    "stopping",  # a stop was requested, the attempt is ending → cancelled, paused, queued (preempted), succeeded
    "paused",  # stopped with a checkpoint                    → queued (resume), cancelled
    "succeeded",
    "failed",
    "cancelled",
]
ACTIVE: frozenset[Status] = frozenset({"starting", "running", "stopping"})
WAITING: frozenset[Status] = frozenset({"queued", "retrying"})
# The run waits for a user's command.
HALTED: frozenset[Status] = frozenset({"held", "paused"})
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})


class CheckpointInfo(msgspec.Struct, frozen=True):
    """A published checkpoint. `version` is the stream version of its event. `superseded`: a later attempt continued from an
    earlier step. `is_parents`: it belongs to the parent of this fork. `forks` are the runs that start from it. `order` is
    `Run.order` at this checkpoint, None if an older sftd did not record it. `weights_only`: training cannot continue from
    it."""

    step: int
    path: str
    bytes: int
    manifest_digest: str
    tokens_total: int
    version: int
    published_at: e.Micros
    val_loss: float | str | None = None
    verified: bool = False
    superseded: bool = False
    is_parents: bool = False
    forks: tuple[str, ...] = ()
    order: tuple[OrderStart, ...] | None = None
    weights_only: bool = False


class ForkPoint(msgspec.Struct, frozen=True):
    """Where a fork starts: the parent's step (0 is the pretrained model), and the position in the sample order from which the
    fork reads (None in the state of an older sftd). `mixture`: where its mixture of sources begins, None at their first rows."""

    parent: str
    step: int
    tokens_total: int
    sample: int | None = None
    mixture: MixtureStart | None = None


class Replay(msgspec.Struct, frozen=True):
    """The last verification of steps after `from_step` up to `to_step`. `diverged_at` is the first step that differs, None if
    all match."""

    from_step: int
    to_step: int
    diverged_at: int | None
    at: e.Micros


class Validation(msgspec.Struct, frozen=True):
    """A validation. A non-finite loss is stored as its name (see `codec.json_float`)."""

    step: int
    loss: float | str


class Saving(msgspec.Struct, frozen=True):
    """A checkpoint in progress, with the values of its step."""

    step: int
    tokens_total: int
    val_loss: float | str | None


EvaluationStatus = Literal["pending", "running", "done", "failed"]


class EvaluationState(msgspec.Struct, frozen=True):
    """An evaluation of the checkpoint of `step`, which has its status since `since`. `tries` counts starts. While it runs,
    `daemon` runs it, and `started` is the stream version of its start: only the daemon of that start may record its end.
    `answers` is the Parquet file of the answers on the host that evaluated."""

    name: str
    step: int
    status: EvaluationStatus
    since: e.Micros
    tries: int = 0
    started: int = 0
    daemon: str = ""
    manifest_digest: str = ""
    metrics: dict[str, float] = {}
    questions: int = 0
    questions_digest: str = ""
    seconds: float = 0.0
    answers: str | None = None
    message: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the evaluation waits or runs."""
        return self.status in ("pending", "running")


class Run(msgspec.Struct, frozen=True):
    """The state of a run at `version`. Holds only values that decisions and summaries need; steps stay in the log."""

    run_id: str
    version: int = 0
    status: Status = "queued"
    spec: Spec = Spec()
    spec_digest: str = ""
    user: str = ""
    # sha256 of the data files as submitted.
    train_digest: str = ""
    val_digest: str = ""
    # Of the mixture, if the run has one.
    sources: tuple[SourceFacts, ...] = ()
    planned_steps: int = 0
    fork: ForkPoint | None = None
    # Positions of the timeline's steps in the sample order: each piece applies from its step. Empty: from 0.
    order: tuple[OrderStart, ...] = ()
    submitted_at: e.Micros = 0
    started_at: e.Micros | None = None
    ended_at: e.Micros | None = None
    # When a user removed the run's files.
    removed_at: e.Micros | None = None
    updated_at: e.Micros = 0
    attempt: int = 0
    daemon: str | None = None
    # The resource manager's last report on the attempt's job.
    job_report: e.JobReported | None = None
    retry_at: e.Micros | None = None
    # The requested stop: user, reason, following state, and whether to kill the attempt.
    stop_by: str | None = None
    stop_reason: str = ""
    stop_then: e.AfterStop = "cancelled"
    stop_now: bool = False
    preempted_by: str | None = None
    # The run does not start before these runs have succeeded.
    after: tuple[str, ...] = ()
    sweep: str = ""
    resume_from: int | None = None
    # Whether recomputed steps must match bit for bit: the log's steps were computed deterministically, in the same
    # environment (versions, device, layout).
    is_exact: bool = True
    # Up to this step the log may have steps from another environment; None: it never changed.
    loose_until: int | None = None
    # The step after which the last attempt began.
    began_at: int = 0
    environment: dict[str, Any] = {}
    # The timeline, without superseded steps.
    step: int = 0
    loss: float | str | None = None
    lr: float | None = None
    tokens_counted: int = 0
    tokens_reported: int = 0
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    first_validation: Validation | None = None
    last_validation: Validation | None = None
    best_validation: Validation | None = None
    checkpoints: tuple[CheckpointInfo, ...] = ()
    # Step → forks of a rejected checkpoint. The forks may still load it, and it may be published again.
    rejected_pins: dict[int, tuple[str, ...]] = {}
    last_replay: Replay | None = None
    # Of the timeline's checkpoints and of those that a user requested, by step and name.
    evaluations: tuple[EvaluationState, ...] = ()
    # Why the trained steps are enough, until an attempt begins again.
    stopped_early: e.StoppedEarly | None = None
    # Values of a metric count for early stopping after this step: that of a resume after an early stop.
    patience_from: int = -1
    # Values of the checkpoint being written: training may be further along when it is published.
    saving: Saving | None = None
    # Over all attempts.
    highest_step: int = 0
    steps_redone: int = 0
    anomalies: int = 0
    preemptions: int = 0
    attempt_base: int = 0
    attempt_progressed: bool = False
    fruitless_attempts: int = 0
    cause: str | None = None
    message: str | None = None

    @property
    def restart_checkpoint(self) -> CheckpointInfo | None:
        """The checkpoint from which the next attempt starts: the requested one or the timeline's newest; None is the
        pretrained model."""
        if self.resume_from is not None:
            return next((c for c in self.checkpoints if c.step == self.resume_from), None)
        whole = (c for c in self.checkpoints if not (c.superseded or c.weights_only))
        return max(whole, key=lambda c: c.step, default=None)

    @property
    def pins(self) -> dict[int, tuple[str, ...]]:
        """Step → forks that start from its checkpoint, rejected checkpoints included."""
        return {c.step: c.forks for c in self.checkpoints if c.forks} | self.rejected_pins

    def evaluation_of(self, name: str, step: int) -> EvaluationState | None:
        """The evaluation of a step's checkpoint, if it was ever due."""
        return next((x for x in self.evaluations if (x.name, x.step) == (name, step)), None)

    @property
    def metrics(self) -> dict[str, tuple[float, int]]:
        """`NAME/METRIC` of the evaluations → newest value and its step."""
        done = [x for x in self.evaluations if x.status == "done"]
        return {f"{x.name}/{key}": (value, x.step) for x in done for key, value in x.metrics.items()}

    @property
    def checkpoint_bytes(self) -> int:
        """Total bytes of the run's own checkpoints, according to the log."""
        return sum(c.bytes for c in self.checkpoints if not c.is_parents)

    @property
    def how_it_ended(self) -> str:
        """The end of an ended run in words: `was cancelled`, `has failed`."""
        return f"{'was' if self.status == 'cancelled' else 'has'} {self.status}"

    @property
    def dtype(self) -> str:
        """Dtype of the last attempt, by its torch name; empty before the first."""
        return str(self.environment.get("dtype", ""))

    @property
    def order_start(self) -> OrderStart:
        """The piece of the sample order that the next attempt reads. It is not always the last: a resume from an earlier step,
        or a rejected checkpoint, can go back to before a piece."""
        start = self.restart_checkpoint
        order = self.order_behind(start.step if start else 0)
        return order[-1] if order else FROM_THE_BEGINNING

    def order_behind(self, step: int) -> tuple[OrderStart, ...]:
        """`order` after the timeline goes back to the checkpoint of `step` (0 is the pretrained model)."""
        saved = next((c.order for c in self.checkpoints if c.step == step), None)
        return order_up_to(self.order, step) if saved is None else saved

    def sample_position(self, step: int) -> int:
        """Position of the first sample of the timeline's 0-based `step` in the sample order."""
        piece = next((o for o in reversed(self.order) if o.step <= step), FROM_THE_BEGINNING)
        return piece.position(step, self.spec.data.train_batch_size)

    @property
    def mixture_start(self) -> MixtureStart:
        """Where the run's mixture of sources begins."""
        return self.fork.mixture if self.fork and self.fork.mixture else MixtureStart()

    @property
    def first_step(self) -> int:
        """The step after which the run's own steps begin: the fork point, else 0."""
        return self.fork.step if self.fork else 0
