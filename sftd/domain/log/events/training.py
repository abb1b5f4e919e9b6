"""Events of training, and the results of later verifications."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from sftd.domain.log.events.base import Event, NoticeFacts, NoticeKind, OfStep, Severity
from sftd.domain.text.words import counted, loss, memory, size


class ModelLoaded(Event, frozen=True):
    """Every rank has loaded its weights. `environment` determines the numbers: versions, device, threads, layout.
    `trained_parameters`: of `parameters`, where some are frozen."""

    schema_version: ClassVar[int] = 2
    progress: ClassVar[str | None] = "model: "

    architecture: str
    parameters: int
    dtype: str
    device: str
    seconds: float
    environment: dict[str, Any]
    trained_parameters: int | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether recomputing this attempt's steps gives the same bits."""
        return bool(self.environment.get("deterministic", True))

    def summary(self) -> str:
        size = f"{self.parameters / 1e6:.1f} M parameters"
        if self.trained_parameters is not None:
            size += f" ({self.trained_parameters / 1e6:.2f} M trained)"
        return f"{self.architecture}, {size}, {self.dtype} on {self.device}, {self.seconds:.1f} s"


class WeightsDigested(Event, frozen=True):
    """Digests over all bytes of the weight files that the attempt loaded, recorded before its first step. `files` maps names
    to digests: sha256 over the size and the sha256 of each 64 MiB piece, so that ranks can share the work. `seconds` is the
    duration, mostly in the background."""

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


class SourceFigures(msgspec.Struct, frozen=True):
    """One of several sources in a step or a validation: its rows, their trained tokens, and the mean loss of those, weighted as
    that of the event."""

    rows: int
    tokens: int
    loss: float


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats, infinite beyond the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class StepCompleted(OfStep, Event, frozen=True):
    """One optimizer step. `loss` is the mean over the trained tokens of the global batch (Σ weight · loss ÷ Σ weight if the data
    has weights), `grad_norm` is before clipping.

    `tokens` counts trained tokens (label is not -100), `tokens_real` excludes padding, `tokens_padded` includes it.
    `tokens_total` counts the trained tokens of all steps up to this one. `samples_digest` is a sha256 over the global row
    numbers in order. `mfu` is the model FLOPs utilization in 0 … 1, None if the device's peak FLOP/s is unknown.
    `peak_memory_bytes` is the largest use of any rank so far (tensors on a GPU, the process on a CPU). `load_balancing_loss` and
    `z_loss` are those of `model.moe`, without their coefficients and not part of `loss`; None where they are off.
    `token_accuracy`: share of the trained tokens whose logit is the highest. `entropy`: mean over the trained tokens of
    −Σ p · log p in nats. Neither is weighted. `sources`: the sources that the step reads, by name; None if there is only one.
    """

    schema_version: ClassVar[int] = 4
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
    load_balancing_loss: float | None = None
    z_loss: float | None = None
    token_accuracy: float | None = None
    entropy: float | None = None
    sources: dict[str, SourceFigures] | None = None

    def details(self) -> str:
        # Short, so that a line of `sftd logs`, which starts with the attempt, usually fits 80 columns.
        return (
            f"loss {loss(self.loss)}  grad {self.grad_norm:.3f}  lr {self.lr:.2e}"
            + (f"  {self.tokens_real / self.seconds:,.0f} tok/s" if self.seconds > 0 else "")
            + (f"  MFU {self.mfu:.1%}  {memory(self.peak_memory_bytes or 0)}" if self.mfu is not None else "")
            + (f"  balance {self.load_balancing_loss:.3f}" if self.load_balancing_loss is not None else "")
            + (f"  z {self.z_loss:.3g}" if self.z_loss is not None else "")
        )


class ValidationCompleted(OfStep, Event, frozen=True):
    """The whole validation set was evaluated: `loss` is the mean over its `tokens` trained tokens. `token_accuracy`, `entropy` and
    `sources` as in `StepCompleted`.

    `expert_load`: number of each layer with experts → share of the tokens' choices that went to the expert with the most of them.
    None for a dense model.
    """

    schema_version: ClassVar[int] = 3
    progress: ClassVar[str] = "validation "

    step: int
    loss: float
    tokens: int
    rows: int
    seconds: float
    expert_load: dict[int, float] | None = None
    token_accuracy: float | None = None
    entropy: float | None = None
    sources: dict[str, SourceFigures] | None = None

    def details(self) -> str:
        found = f"loss {loss(self.loss)} over {counted(self.tokens, 'token')}"
        if self.token_accuracy is not None:
            found += f", accuracy {self.token_accuracy:.1%}"
        if self.expert_load:
            fullest = max(self.expert_load, key=self.expert_load.__getitem__)
            found += f"; fullest expert {self.expert_load[fullest]:.1%} (layer {fullest})"
        return found


class StoppedEarly(OfStep, Event, frozen=True):
    """Training ends after this step, by `trainer.early_stop`: the last `patience` values of `metric` did not improve on `best`, of
    step `best_step`. `best` is None if no value was finite."""

    progress: ClassVar[str] = "stopped early: "
    is_lifecycle: ClassVar[bool] = True

    step: int
    metric: str
    best: float | None
    best_step: int
    patience: int

    @property
    def reason(self) -> str:
        """The reason in words."""
        if self.best is None:
            return f"{self.metric} was never finite in {counted(self.patience, 'value')}"
        return f"{self.metric} has not improved on {self.best:.4g} (step {self.best_step}) in {counted(self.patience, 'value')}"

    def details(self) -> str:
        return self.reason


class SampleGenerated(OfStep, Event, frozen=True):
    """The model of `step` answered a fixed prompt with greedy decoding."""

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
    """Something that must not happen, such as a redone step that differs from the log, or a NaN loss."""

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
    """Training returns to the checkpoint of `step` and continues at position `sample` of the sample order. It skips the
    samples in between, which caused `reason`."""

    step: int
    sample: int
    reason: str

    def summary(self) -> str:
        return f"back to step {self.step}, continues at sample {self.sample}: {self.reason}"


class ReplayVerified(Event, frozen=True):
    """Steps after `from_step` up to `to_step` were recomputed elsewhere and match the log: bit for bit, or to within
    rounding if `is_exact` is false. `environment` maps differing keys to [the log's, the verifier's]."""

    from_step: int
    to_step: int
    is_exact: bool
    environment: dict[str, Any]
    by: str

    def summary(self) -> str:
        how = "bit for bit" if self.is_exact else "to within rounding"
        return f"steps {self.from_step + 1} to {self.to_step} match the log {how}, verified by {self.by}"


class ReplayDiverged(Event, frozen=True):
    """Steps after `from_step` were recomputed elsewhere, and `step` is the first that differs from the log. `detail` is as in
    `AnomalyDetected`. `environment` maps differing keys to [the log's, the verifier's]."""

    severity: ClassVar[Severity] = "problem"
    notice_kind: ClassVar[NoticeKind | None] = "anomaly"

    from_step: int
    to_step: int
    step: int
    detail: dict[str, Any]
    environment: dict[str, Any]
    by: str

    def summary(self) -> str:
        differs = f"; environment differs: {', '.join(self.environment)}" if self.environment else ""
        numbers = ", ".join(self.detail)
        return f"step {self.step} differs from the log ({numbers}){differs}, verified by {self.by}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"anomaly: step {self.step:,}, recomputed by {self.by}, differs from the log"


def _details(detail: dict[str, Any]) -> Iterator[str]:
    """The details of an anomaly as text. Compared numbers have full precision, as they may differ in the last digit."""

    def short(value: object) -> str:
        text = str(value)
        return text[:12] if len(text) == 64 and " " not in text else text

    for name, value in detail.items():
        label = name.removesuffix("_digest").replace("_", " ")
        if isinstance(value, dict) and value.keys() == {"recorded", "redone"}:
            yield f"{label}: log {short(value['recorded'])}, now {short(value['redone'])}"
        elif value is not None:
            yield f"{label} {value:.6g}" if isinstance(value, float) else f"{label} {short(value)}"
