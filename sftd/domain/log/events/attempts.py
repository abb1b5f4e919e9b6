"""Events of an attempt: its daemon and host, its end, and the load of its host."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from sftd.domain.log.events.base import Event, Micros, NoticeFacts, NoticeKind, Severity
from sftd.domain.spec.launch.launchers import holder_of
from sftd.domain.text.words import first_line, memory


class AttemptClaimed(Event, frozen=True):
    """A daemon claimed the next attempt. The attempt starts from `from_step` (0 is the pretrained model)."""

    is_lifecycle: ClassVar[bool] = True

    daemon: str
    host: str
    from_step: int
    checkpoint: str | None = None

    def summary(self) -> str:
        start = f"step {self.from_step}" if self.from_step else "the pretrained model"
        return f"from {start}, by {self.daemon}"


class AttemptLaunched(Event, frozen=True):
    """torchrun was started. `pid` and `create_time` (seconds since the epoch) together identify the process."""

    notice_kind: ClassVar[NoticeKind | None] = "started"

    pid: int
    create_time: float
    host: str
    directory: str
    argv: list[str]
    devices: list[str]

    def summary(self) -> str:
        if not self.pid:
            return f"handed to {holder_of(self.devices).shown} on {self.host}"
        return f"pid {self.pid} on {self.host}, {', '.join(self.devices)}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"started on {self.host}"


class AttemptAdopted(Event, frozen=True):
    """Another daemon took over a running attempt."""

    daemon: str
    host: str
    pid: int

    def summary(self) -> str:
        return (f"pid {self.pid}, " if self.pid else "") + f"by {self.daemon}"


class JobReported(Event, frozen=True):
    """The resource manager reported a change of an attempt's job. `state` and `reason` are the manager's own terms. The state
    is `NOT SUBMITTED` until the manager accepts the job, and `NOT OBSERVED` while it does not answer."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def just_runs(self) -> bool:
        """Whether the job runs and the report has no reason."""
        return self.state == "RUNNING" and not self.reason

    def summary(self) -> str:
        parts = (f"job {self.job}" if self.job else "", self.state, self.reason, self.nodes)
        return "  ".join(part for part in parts if part)


class AttemptPaused(Event, frozen=True):
    """The attempt ended because a user paused the run. The next attempt continues from `step`."""

    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "paused"

    step: int
    by: str

    def summary(self) -> str:
        return f"at step {self.step}, by {self.by}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"was paused by {self.by} at step {self.step:,}"


class AttemptPreempted(Event, frozen=True):
    """The attempt made room for another run, and its own run is queued again in its old place. The next attempt continues from
    `step`. If the resource manager took the machines back, `by_run` is empty and `reason` is set."""

    schema_version: ClassVar[int] = 2
    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "paused"

    step: int
    by_run: str
    reason: str = ""

    def summary(self) -> str:
        return f"at step {self.step}, {self.reason or f'by {self.by_run}'}; queued again"

    def notice(self, run: NoticeFacts) -> str | None:
        if self.by_run:
            return f"made room for {self.by_run} at step {self.step:,}"
        return f"was interrupted at step {self.step:,}, and is queued again: {first_line(self.reason)}"


class AttemptFailed(Event, frozen=True):
    """An attempt ended before its run did. `evidence` are the lines that prove the cause."""

    severity: ClassVar[Severity] = "problem"
    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "retrying"

    cause: str
    message: str
    exit_code: int | None
    evidence: list[str] = []
    retry_at: Micros | None = None

    def summary(self) -> str:
        return f"{self.cause}: {self.message}"

    def notice(self, run: NoticeFacts) -> str | None:
        if self.retry_at is None:
            return None
        return f"failed {run.where}, and will be tried again: {self.cause}: {first_line(self.message)}"


class AttemptLost(Event, frozen=True):
    """An attempt's process is gone and left no exit code (killed with its supervisor, or the host restarted)."""

    severity: ClassVar[Severity] = "problem"
    is_lifecycle: ClassVar[bool] = True
    ends_attempt: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "retrying"

    message: str
    retry_at: Micros | None = None

    def summary(self) -> str:
        return self.message

    def notice(self, run: NoticeFacts) -> str | None:
        if self.retry_at is None:
            return None
        return f"was lost {run.where}, and will be tried again: {first_line(self.message)}"


class GpuSample(msgspec.Struct, frozen=True):
    """One sample of a GPU, by NVML index. Values that the driver does not report are None."""

    index: int
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_watts: float | None


class SystemSampled(Event, frozen=True):
    """Load of an attempt's host, measured by its daemon: CPU (mean of all cores since the previous sample) and memory of the
    whole host, and the GPUs that the attempt holds."""

    host: str
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    gpus: list[GpuSample] = []

    def summary(self) -> str:
        gpus = [
            f"GPU {gpu.index}"
            + (f" {gpu.utilization_percent:.0f} %" if gpu.utilization_percent is not None else "")
            + (f" {memory(gpu.memory_used_bytes)}" if gpu.memory_used_bytes is not None else "")
            for gpu in self.gpus
        ]
        return ", ".join([f"CPU {self.cpu_percent:.0f} %", memory(self.memory_used_bytes), *gpus])
