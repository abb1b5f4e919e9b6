"""The state of a run, as `evolve` folds it from events. The fold is the only way to make one."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sftd.domain.log import events as e
from sftd.domain.log.timeline import order_up_to
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec

Status = Literal[
    "queued",  # waits for its turn                           → starting, held, cancelled
    "retrying",  # waits until retry_at after a failure        → starting, held, cancelled
    "held",  # a person keeps it from starting                → queued, retrying, cancelled
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
# Nothing happens until a person says so.
HALTED: frozenset[Status] = frozenset({"held", "paused"})
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})


class CheckpointInfo(msgspec.Struct, frozen=True):
    """A published checkpoint. `version` is its event's place in the stream; a superseded one lies after a step from
    which a later attempt continued. `is_parents`: it is another run's, from which this one was forked. `forks` start from it.
    `order` is the run's as of this checkpoint (see `Run.order`), None where an older sftd did not record it. Training cannot
    continue from one with `weights_only`."""

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
    """Where a fork left its parent, and the position in the order of samples from which it reads (None in a state that an
    older sftd stored). At step 0 it starts from the parent's pretrained model."""

    parent: str
    step: int
    tokens_total: int
    sample: int | None = None


class Replay(msgspec.Struct, frozen=True):
    """The last time that steps after `from_step` up to `to_step` were trained again elsewhere. `diverged_at` is the first
    that differs, None when all match."""

    from_step: int
    to_step: int
    diverged_at: int | None
    at: e.Micros


class Validation(msgspec.Struct, frozen=True):
    """A validation. A loss that is not finite is kept as its name (see `codec.json_float`)."""

    step: int
    loss: float | str


class Saving(msgspec.Struct, frozen=True):
    """A checkpoint that was begun, and what was known of its step then."""

    step: int
    tokens_total: int
    val_loss: float | str | None


class Run(msgspec.Struct, frozen=True):
    """What the log says of a run up to `version`. Only what a decision or a summary needs; steps stay in the log."""

    run_id: str
    version: int = 0
    status: Status = "queued"
    spec: Spec = Spec()
    spec_digest: str = ""
    user: str = ""
    # sha256 of the data as submitted: a changed file is another run.
    train_digest: str = ""
    val_digest: str = ""
    planned_steps: int = 0
    fork: ForkPoint | None = None
    # Where in the order of samples the timeline's steps read: each piece from its step on. Without one, from 0.
    order: tuple[OrderStart, ...] = ()
    submitted_at: e.Micros = 0
    started_at: e.Micros | None = None
    ended_at: e.Micros | None = None
    # When a person removed its files, after it had ended.
    removed_at: e.Micros | None = None
    updated_at: e.Micros = 0
    attempt: int = 0
    daemon: str | None = None
    # What the resource manager last said of the attempt's job.
    job_report: e.JobReported | None = None
    retry_at: e.Micros | None = None
    # The stop that was asked for: by whom and why, what follows it, and whether the attempt is killed for it.
    stop_by: str | None = None
    stop_reason: str = ""
    stop_then: e.AfterStop = "cancelled"
    stop_now: bool = False
    preempted_by: str | None = None
    # It does not start before these have succeeded.
    after: tuple[str, ...] = ()
    sweep: str = ""
    resume_from: int | None = None
    # Whether a step that this attempt computes again must match bit for bit: what the log has of it was computed
    # deterministically, and in the same environment (versions, device, layout).
    is_exact: bool = True
    # Up to this step the log may have steps of another environment than the last attempt's; None: it never changed.
    loose_until: int | None = None
    # The step after which the last attempt began.
    began_at: int = 0
    environment: dict[str, Any] = {}
    # The timeline: what later attempts have not superseded.
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
    # Step → forks that start from its checkpoint, which this run could not load: they may, and it may be published again.
    rejected_pins: dict[int, tuple[str, ...]] = {}
    last_replay: Replay | None = None
    # What a checkpoint being written will hold: training may be steps further when it is published.
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
        """Where the next attempt starts: the asked-for checkpoint or the newest of the timeline; None is the pretrained model."""
        if self.resume_from is not None:
            return next((c for c in self.checkpoints if c.step == self.resume_from), None)
        whole = (c for c in self.checkpoints if not (c.superseded or c.weights_only))
        return max(whole, key=lambda c: c.step, default=None)

    @property
    def pins(self) -> dict[int, tuple[str, ...]]:
        """Step → the forks that start from its checkpoint, damaged ones included."""
        return {c.step: c.forks for c in self.checkpoints if c.forks} | self.rejected_pins

    @property
    def checkpoint_bytes(self) -> int:
        """What the run's own checkpoints take, as the log has it."""
        return sum(c.bytes for c in self.checkpoints if not c.is_parents)

    @property
    def how_it_ended(self) -> str:
        """Of a run that has ended, in words: `was cancelled`, `has failed`."""
        return f"{'was' if self.status == 'cancelled' else 'has'} {self.status}"

    @property
    def dtype(self) -> str:
        """What the last attempt computed in, by torch's name; empty before the first."""
        return str(self.environment.get("dtype", ""))

    @property
    def order_start(self) -> OrderStart:
        """The piece of the order of samples that the steps of the next attempt read: it may go back to before a piece that
        began later, when it was asked to, or when a checkpoint was rejected."""
        start = self.restart_checkpoint
        order = self.order_behind(start.step if start else 0)
        return order[-1] if order else FROM_THE_BEGINNING

    def order_behind(self, step: int) -> tuple[OrderStart, ...]:
        """What `order` is once the timeline has gone back to the checkpoint of `step` (0 is the pretrained model)."""
        saved = next((c.order for c in self.checkpoints if c.step == step), None)
        return order_up_to(self.order, step) if saved is None else saved

    def sample_position(self, step: int) -> int:
        """Position in the order of samples of the first sample of 0-based `step` of the timeline."""
        piece = next((o for o in reversed(self.order) if o.step <= step), FROM_THE_BEGINNING)
        return piece.position(step, self.spec.data.train_batch_size)

    @property
    def first_step(self) -> int:
        """The step after which the run's own steps begin: where it was forked, else 0."""
        return self.fork.step if self.fork else 0
