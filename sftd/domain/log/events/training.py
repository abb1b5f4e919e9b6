"""Facts that the trainer reports, and what a later verification found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sftd.domain.log.events.base import Event, NoticeFacts, NoticeKind, OfStep, Severity
from sftd.domain.text.words import counted, loss, memory, size


class ModelLoaded(Event, frozen=True):
    """Every rank holds its weights. `environment` is what decides the numbers: versions, device, threads, layout."""

    progress: ClassVar[str | None] = "model: "

    architecture: str
    parameters: int
    dtype: str
    device: str
    seconds: float
    environment: dict[str, Any]

    @property
    def is_deterministic(self) -> bool:
        """Whether this attempt's steps are the same bit for bit when they are computed again."""
        return bool(self.environment.get("deterministic", True))

    def summary(self) -> str:
        millions = self.parameters / 1e6
        return f"{self.architecture}, {millions:.1f} M parameters, {self.dtype} on {self.device}, {self.seconds:.1f} s"


class WeightsDigested(Event, frozen=True):
    """All bytes of the weight files that the attempt loaded, before its first step. `files` maps their names to digests:
    sha256 over the size and the sha256 of each piece of 64 MiB, so that ranks can share the work. `seconds` is how long
    it took, mostly in the background."""

    severity: ClassVar[Severity] = "detail"

    files: dict[str, str]
    bytes: int
    seconds: float

    def summary(self) -> str:
        return f"{counted(len(self.files), 'file')}, {size(self.bytes)}, {self.seconds:.1f} s"


class DataBound(Event, frozen=True):
    """The data files are open and the order of samples is fixed. Digests are sha256 over the files."""

    progress: ClassVar[str | None] = "data: "
    severity: ClassVar[Severity] = "detail"

    train_rows: int
    train_digest: str
    val_rows: int
    val_digest: str
    truncated_rows: int
    dropped_rows: int
    steps_per_epoch: float
    planned_steps: int

    def summary(self) -> str:
        cut = f", {self.truncated_rows} truncated" if self.truncated_rows else ""
        dropped = f", {self.dropped_rows} dropped" if self.dropped_rows else ""
        return f"{counted(self.train_rows, 'row')}, {self.val_rows:,} for validation{cut}{dropped}"


class TrainingResumed(Event, frozen=True):
    """The attempt continues from the checkpoint of `step`; steps after it in earlier attempts are redone."""

    progress: ClassVar[str | None] = "resumed "
    severity: ClassVar[Severity] = "detail"
    is_lifecycle: ClassVar[bool] = True

    step: int
    path: str
    tokens_total: int

    def summary(self) -> str:
        return f"from step {self.step}"


class StepCompleted(OfStep, Event, frozen=True):
    """One optimizer step. `loss` is the mean over the trained tokens of the global batch, `grad_norm` is before clipping.

    `tokens` are trained (label is not -100), `tokens_real` not padding, `tokens_padded` all that was computed.
    `tokens_total` are the trained tokens of all steps up to this one. `samples_digest` is a sha256 over the
    global row numbers in order. `mfu` is the share of the devices' peak FLOP/s that the model's own FLOPs took, None where
    the peak is not known; `peak_memory_bytes` the most that any rank has had in use so far (on a GPU its tensors', on a
    CPU the process's).
    """

    schema_version: ClassVar[int] = 2
    progress: ClassVar[str] = ""

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

    def details(self) -> str:
        # Short: the line in `sftd logs`, with its attempt before it, fits 80 columns on most runs.
        return (
            f"loss {loss(self.loss)}  grad {self.grad_norm:.3f}  lr {self.lr:.2e}"
            + (f"  {self.tokens_real / self.seconds:,.0f} tok/s" if self.seconds > 0 else "")
            + (f"  MFU {self.mfu:.1%}  {memory(self.peak_memory_bytes or 0)}" if self.mfu is not None else "")
        )


class ValidationCompleted(OfStep, Event, frozen=True):
    """The whole validation set was evaluated: `loss` is the mean over its `tokens` trained tokens."""

    progress: ClassVar[str] = "validation "

    step: int
    loss: float
    tokens: int
    rows: int
    seconds: float

    def details(self) -> str:
        return f"loss {loss(self.loss)} over {counted(self.tokens, 'token')}"


class SampleGenerated(OfStep, Event, frozen=True):
    """A fixed prompt was answered greedily with the model of `step`."""

    progress: ClassVar[str] = ""
    severity: ClassVar[Severity] = "detail"

    step: int
    prompt: str
    text: str
    tokens: int
    stopped: bool

    def details(self) -> str:
        return f"{self.prompt!r} → {self.text!r}"


class AnomalyDetected(Event, frozen=True):
    """Something that must not be: a redone step that differs from the log, a loss that is not a number."""

    progress: ClassVar[str | None] = "ANOMALY at "
    severity: ClassVar[Severity] = "problem"
    notice_kind: ClassVar[NoticeKind | None] = "anomaly"

    step: int
    what: str
    detail: dict[str, Any] = {}

    def summary(self) -> str:
        return f"step {self.step}: " + "  ".join((self.what, *_details(self.detail)))

    def notice(self, run: NoticeFacts) -> str | None:
        return f"anomaly at step {self.step:,}: {self.what}"


class SamplesSkipped(Event, frozen=True):
    """Training goes back to the checkpoint of `step` and on at position `sample` of the order of samples: those in between
    led to what `reason` says, and are left out."""

    step: int
    sample: int
    reason: str

    def summary(self) -> str:
        return f"back to step {self.step}, on at sample {self.sample}: {self.reason}"


class ReplayVerified(Event, frozen=True):
    """Steps after `from_step` up to `to_step` were trained again elsewhere and match the log: bit for bit,
    or to within rounding where `is_exact` is false. `environment` maps what differs to [the log's, the verifier's]."""

    from_step: int
    to_step: int
    is_exact: bool
    environment: dict[str, Any]
    by: str

    def summary(self) -> str:
        how = "bit for bit" if self.is_exact else "except for rounding"
        return (
            f"steps {self.from_step + 1} to {self.to_step} came out as the log has them, {how}, by {self.by}"
        )


class ReplayDiverged(Event, frozen=True):
    """Steps after `from_step` were trained again elsewhere, and `step` is the first that differs from the log. `detail` is
    that of `AnomalyDetected`, `environment` maps what differs to [the log's, the verifier's]."""

    severity: ClassVar[Severity] = "problem"
    notice_kind: ClassVar[NoticeKind | None] = "anomaly"

    from_step: int
    to_step: int
    step: int
    detail: dict[str, Any]
    environment: dict[str, Any]
    by: str

    def summary(self) -> str:
        differs = f"; differs: {', '.join(self.environment)}" if self.environment else ""
        return f"step {self.step} came out otherwise ({', '.join(self.detail)}){differs}, by {self.by}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"anomaly: step {self.step:,}, trained again by {self.by}, differs from the log"


def _details(detail: dict[str, Any]) -> Iterator[str]:
    """What an anomaly says of itself: numbers in full where two are compared, for they may differ in the last digit."""

    def short(value: object) -> str:
        text = str(value)
        return text[:12] if len(text) == 64 and " " not in text else text

    for name, value in detail.items():
        label = name.removesuffix("_digest").replace("_", " ")
        if isinstance(value, dict) and value.keys() == {"recorded", "redone"}:
            yield f"{label}: log {short(value['recorded'])}, now {short(value['redone'])}"
        elif value is not None:
            yield f"{label} {value:.6g}" if isinstance(value, float) else f"{label} {short(value)}"
