"""Events of evaluations. `name` is that of the evaluation in the spec, `step` that of the checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar

from sftd.domain.log.events.base import Event, NoticeFacts, NoticeKind, OfStep, Severity
from sftd.domain.text.words import counted, first_line


class EvaluationRequested(Event, frozen=True):
    """A user requested an evaluation, also one that has run before."""

    severity: ClassVar[Severity] = "detail"

    name: str
    step: int
    by: str

    def summary(self) -> str:
        return f"step {self.step}  {self.name}, by {self.by}"


class EvaluationStarted(Event, frozen=True):
    """A daemon evaluates the checkpoint in `checkpoint`, whose manifest has the sha256 `manifest_digest`, on `devices` of its
    host."""

    severity: ClassVar[Severity] = "detail"

    name: str
    step: int
    checkpoint: str
    manifest_digest: str
    daemon: str
    devices: list[str]

    def summary(self) -> str:
        return f"step {self.step}  {self.name} on {', '.join(self.devices)}, by {self.daemon}"


class EvaluationInterrupted(Event, frozen=True):
    """A daemon stopped an evaluation, which waits for its turn again."""

    severity: ClassVar[Severity] = "detail"

    name: str
    step: int
    reason: str

    def summary(self) -> str:
        return f"step {self.step}  {self.name}: {self.reason}"


class EvaluationCompleted(OfStep, Event, frozen=True):
    """The result of an evaluation. `metrics` are finite. `questions_digest` is the sha256 of the questions, empty if the kind
    has none. `environment` describes the process that evaluated. `answers` is the Parquet file with the answers."""

    progress: ClassVar[str] = "evaluation "
    notice_kind: ClassVar[NoticeKind | None] = "evaluated"

    name: str
    step: int
    kind: str
    metrics: dict[str, float]
    questions: int
    questions_digest: str
    manifest_digest: str
    environment: dict[str, Any]
    seconds: float
    answers: str | None = None

    def details(self) -> str:
        return f"{self.name}: {self._metrics()}"

    def _metrics(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())

    def notice(self, run: NoticeFacts) -> str | None:
        over = f" ({counted(self.questions, 'question')})" if self.questions else ""
        return f"evaluation {self.name} of step {self.step:,}: {self._metrics()}{over}"


class EvaluationFailed(OfStep, Event, frozen=True):
    """An evaluation ended without a result. It waits for its turn again if `will_retry`."""

    progress: ClassVar[str] = "failed evaluation "
    severity: ClassVar[Severity] = "problem"
    notice_kind: ClassVar[NoticeKind | None] = "failed"

    name: str
    step: int
    cause: str
    message: str
    will_retry: bool

    def details(self) -> str:
        return f"{self.name}: {self.cause}: {self.message}"

    def notice(self, run: NoticeFacts) -> str | None:
        if self.will_retry:
            return None
        return (
            f"evaluation {self.name} of step {self.step:,} failed: {self.cause}: {first_line(self.message)}"
        )
