"""Events of a run: its start, the requests of users, and its end."""

from __future__ import annotations

from typing import Any, ClassVar

from sftd.domain.data.mixture import MixtureStart
from sftd.domain.log.events.base import AfterStop, Event, NoticeFacts, NoticeKind, Severity
from sftd.domain.model.files import ModelFiles
from sftd.domain.text.words import changes, counted, first_line, size


class RunSubmitted(Event, frozen=True):
    """A user submitted a run. `spec` is the resolved spec; `data` and `model` are the facts that submit read from the files.
    `model_files` is the content of the model folder, None if an older sftd did not record it."""

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True

    spec: dict[str, Any]
    spec_digest: str
    planned_steps: int
    user: str
    data: dict[str, Any]
    model: dict[str, Any]
    sftd_version: str
    warnings: list[str] = []
    model_files: ModelFiles | None = None

    def summary(self) -> str:
        return f"{counted(self.planned_steps, 'step')}, spec {self.spec_digest[:12]}, by {self.user}"


class RunForked(Event, frozen=True):
    """The run starts from a checkpoint of another run, with another spec. This is the first event of its stream, before
    `RunSubmitted`. `step` 0 is the parent's pretrained model, without a checkpoint.

    `changes` maps the keys whose values differ to [the parent's, the fork's]. Training continues at 0-based step `step` and
    reads from position `sample` of the fork's sample order (see `sample_order`): the parent's position if the fork has the
    parent's order, else 0. `mixture`: where a mixture of sources begins, None at their first rows.
    """

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True

    parent: str
    step: int
    sample: int
    checkpoint: str | None
    manifest_digest: str | None
    bytes: int
    tokens_total: int
    changes: dict[str, Any]
    by: str
    mixture: MixtureStart | None = None

    def summary(self) -> str:
        changed = "".join(f"; {change}" for change in changes(self.changes))
        return f"from step {self.step} of {self.parent}, by {self.by}{changed}"


class RunDeferred(Event, frozen=True):
    """The run does not start before the runs in `after` have succeeded."""

    after: list[str]

    def summary(self) -> str:
        return f"waits for {', '.join(self.after)} to succeed"


class SweepJoined(Event, frozen=True):
    """The run is one point of a sweep; `values` are the settings of this point."""

    is_lifecycle: ClassVar[bool] = True

    sweep: str
    values: dict[str, Any]

    def summary(self) -> str:
        return f"{self.sweep}: " + ", ".join(f"{key}={value}" for key, value in self.values.items())


class RunHeld(Event, frozen=True):
    """A user keeps a waiting run from starting."""

    is_lifecycle: ClassVar[bool] = True

    by: str
    reason: str = ""

    def summary(self) -> str:
        return f"by {self.by}" + (f": {self.reason}" if self.reason else "")


class RunReleased(Event, frozen=True):
    """A held run waits for its turn again."""

    is_lifecycle: ClassVar[bool] = True

    by: str

    def summary(self) -> str:
        return f"by {self.by}"


class StopRequested(Event, frozen=True):
    """The run must stop: a user cancels or pauses it, or the run `preempted_by`, of higher priority, needs its devices.
    `then` is the state that follows. `now` kills the attempt; otherwise it saves a checkpoint at the next step boundary."""

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True

    by: str
    reason: str = ""
    then: AfterStop = "cancelled"
    now: bool = False
    preempted_by: str | None = None

    def summary(self) -> str:
        how = "killed, " if self.now else ""
        follows = "" if self.then == "cancelled" else f"then {self.then}, "
        return f"{how}{follows}by {self.by}" + (f": {self.reason}" if self.reason else "")


class ResumeRequested(Event, frozen=True):
    """A user requested another attempt. `from_step` None is the last published checkpoint.

    `changes` maps keys of the spec to [before, after]; they do not change the trajectory (`trajectory.py`). With changes,
    `spec`, `spec_digest` and `planned_steps` replace the run's.
    """

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True

    by: str
    from_step: int | None = None
    changes: dict[str, Any] = {}
    spec: dict[str, Any] | None = None
    spec_digest: str | None = None
    planned_steps: int | None = None

    def summary(self) -> str:
        where = "the last checkpoint" if self.from_step is None else f"step {self.from_step}"
        changed = "".join(f"; {change}" for change in changes(self.changes))
        return f"from {where}, by {self.by}{changed}"


class RunSucceeded(Event, frozen=True):
    """Steps and tokens in the log match the plan and the trainer's count, and the final checkpoint is published. `reason`: why the
    run stopped before its plan, empty if it did not."""

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "ended"

    steps: int
    tokens: int
    final_checkpoint: str
    reason: str = ""

    def summary(self) -> str:
        early = f"; stopped early: {self.reason}" if self.reason else ""
        return f"{counted(self.steps, 'step')}, {counted(self.tokens, 'trained token')}{early}"

    def notice(self, run: NoticeFacts) -> str | None:
        last = f", loss {float(run.loss):.4g}" if run.loss is not None else ""
        early = f"; stopped early: {self.reason}" if self.reason else ""
        return f"succeeded: {counted(self.steps, 'step')}, {counted(self.tokens, 'token')}{last}{early}"


class RunFailed(Event, frozen=True):
    """The run ended without success, and sftd does not retry it."""

    severity: ClassVar[Severity] = "problem"
    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "failed"

    cause: str
    message: str

    def summary(self) -> str:
        return f"{self.cause}: {self.message}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"failed {run.where}: {self.cause}: {first_line(self.message)}"


class RunCancelled(Event, frozen=True):
    """The run ended because a user cancelled it."""

    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "ended"

    by: str

    def summary(self) -> str:
        return f"by {self.by}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"was cancelled by {self.by} {run.where}"


class RunRemoved(Event, frozen=True):
    """A user removed the files of an ended run: its attempts and checkpoints. Each checkpoint also has a
    `CheckpointDeleted`. `freed_bytes` were deleted. The run's events stay."""

    by: str
    freed_bytes: int

    def summary(self) -> str:
        return f"{size(self.freed_bytes)} freed, by {self.by}"
